"""Packets tell nothing about arms, orders are uniform, and what comes back is checked before it counts."""

import csv
import io
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from scipy import stats

from infra.errors import InvalidInput, NotFound
from training.evaluation.reader_ratings import Ratings, collect, packet_csv
from training.evaluation.reader_study import Criterion, Design, Key, Study, blind

DESIGN = Design(readers=2, criteria=(Criterion(name="fluency"), Criterion(name="correctness", low=0, high=3)))
PROMPTS = [f'Note {n}:\n"sleeps, eats"; well' for n in range(7)]
ARMS = {
    arm: [f"answer {(7 * n + place) % 5}, {n}" for n in range(7)]
    for place, arm in enumerate(("old@1", "new@2", "gold"))
}


def made(secret: object = 0, items: int = 7, arms: int = 3, readers: int = 2) -> tuple[Study, Key]:
    design = DESIGN.model_copy(update={"readers": readers})
    answers = {f"arm-{arm}": [f"{arm} says {n}" for n in range(items)] for arm in range(arms)}
    return blind(design, [f"prompt {n}" for n in range(items)], answers, str(secret), "x")


def test_every_reader_sees_every_answer_once_and_the_key_knows_whose_it_is() -> None:
    study, key = blind(DESIGN, PROMPTS, ARMS, "secret")
    assert len(key.answers) == 2 * 7 * 3
    for reader, packet in enumerate(study.packets):
        seen = Counter()
        for shown in packet:
            place = key.answers[shown.id]
            assert place.reader == reader
            assert shown.prompt == PROMPTS[place.item]
            assert shown.text == ARMS[key.arms[place.arm]][place.item]
            seen[place.item, place.arm] += 1
        assert seen == Counter(itertools.product(range(7), range(3)))
        assert [shown.answer for shown in packet] == ["A", "B", "C"] * 7
        assert [shown.item for shown in packet] == [n for n in range(1, 8) for _ in range(3)]


def test_the_blind_half_names_no_arm_and_is_the_same_whatever_arms_are_called() -> None:
    renamed = dict(zip(("zork@7", "quux@8", "blah"), ARMS.values(), strict=True))
    study, key = blind(DESIGN, PROMPTS, ARMS, "secret")
    other, other_key = blind(DESIGN, PROMPTS, renamed, "secret")
    assert study.packets == other.packets
    assert packet_csv(study, 0) == packet_csv(other, 0)
    assert key.answers == other_key.answers
    assert not any(arm in study.model_dump_json() for arm in ARMS)


def test_nothing_but_the_secret_tells_ids_and_orders() -> None:
    study, key = made("one")
    assert made("one") == (study, key)
    other, other_key = made("two")
    assert not key.answers.keys() & other_key.answers.keys()
    assert [shown.prompt for shown in study.packets[0]] != [shown.prompt for shown in other.packets[0]]
    assert "one" in key.as_file(), "its sha256, which the blind half holds, could be searched for otherwise"
    assert [s.prompt for s in study.packets[0]] != [s.prompt for s in study.packets[1]], "each reader has an own order"


def order_of(study: Study, key: Key, reader: int, item: int) -> tuple[int, ...]:
    return tuple(key.answers[shown.id].arm for shown in study.packets[reader] if shown.item == item)


@pytest.mark.parametrize(("reader", "item"), [(0, 1), (0, 3), (1, 4)])
def test_over_secrets_every_order_of_arms_is_as_frequent(reader: int, item: int) -> None:
    counts = Counter(order_of(*made(secret, items=4), reader, item) for secret in range(1_200))
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_over_secrets_an_items_place_says_nothing_of_it_and_an_ids_order_nothing_of_the_arm() -> None:
    first = Counter(made(secret, items=4)[0].packets[0][0].prompt for secret in range(1_000))
    assert stats.chisquare(list(first.values())).pvalue > 1e-3
    lowest: Counter[int] = Counter()
    for secret in range(1_000):
        study, key = made(secret, items=1)
        lowest[key.answers[min(shown.id for shown in study.packets[0])].arm] += 1
    assert stats.chisquare(list(lowest.values())).pvalue > 1e-3


@pytest.mark.parametrize("items", [3, 7, 12])
def test_each_arm_stands_in_each_position_as_often_to_within_one(items: int) -> None:
    study, key = made(items=items)
    for reader in range(2):
        counts = Counter(
            (arm, place) for item in range(1, items + 1) for place, arm in enumerate(order_of(study, key, reader, item))
        )
        assert {counts[arm, place] for arm in range(3) for place in range(3)} <= {items // 3, -(-items // 3)}


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        ([], {"a": [], "b": []}, "no items"),
        (["x"], {"a": ["y"]}, r"2 to 10 arms; there are 1 \(a\)"),
        (["x"], {str(n): ["y"] for n in range(11)}, "there are 11"),
        (["x", "z"], {"a": ["y", "y"], "b": ["y"]}, "b has 1 answers to 2 items"),
        (["x", "z"], {"a": ["y", ""], "b": ["", " "]}, "All 2 answers of b are empty"),
    ],
)
def test_a_study_that_cannot_be_is_refused(prompts, answers, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        blind(DESIGN, prompts, answers, "secret")


@pytest.mark.parametrize(
    "criteria",
    [
        [],
        [{"name": "fluency"}, {"name": "fluency"}],
        [{"name": "text"}],
        [{"name": "Good one"}],
        [{"name": "fluency", "low": 5, "high": 5}],
    ],
)
def test_criteria_that_cannot_be_rated_by_are_refused(criteria) -> None:
    with pytest.raises(ValidationError):
        Design(criteria=criteria)


# What comes back


@pytest.fixture
def study() -> Study:
    return blind(DESIGN, PROMPTS, ARMS, "secret", "this one")[0]


def filled(study: Study, reader: int) -> list[dict[str, str]]:
    """The packet as its table, each cell filled in: the first answer of each item is preferred."""
    rows = list(csv.DictReader(io.StringIO(packet_csv(study, reader).removeprefix("\ufeff"), newline="")))
    for number, row in enumerate(rows):
        row |= {
            "fluency": str(1 + number % 10),
            "correctness": str(number % 4),
            "preferred": str(int(row["answer"] == "A")),
        }
    return rows


def saved(path: Path, rows: list[dict[str, str]], delimiter: str = ",", mark: str = "") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def both(study: Study, folder: Path, first: list[dict[str, str]] | None = None) -> list[Path]:
    rows = [filled(study, 0) if first is None else first, filled(study, 1)]
    return [saved(folder / f"back-{reader}.csv", each) for reader, each in enumerate(rows)]


def test_what_was_rated_is_what_is_collected_in_whatever_order_files_and_rows_come(
    study: Study, tmp_path: Path
) -> None:
    ratings = collect(study, both(study, tmp_path)[::-1])
    rows = [row for reader in range(2) for row in filled(study, reader)]
    assert set(ratings.by_id) == {row["id"] for row in rows}
    for row in rows:
        rating = ratings.by_id[row["id"]]
        assert rating.scores == {"fluency": int(row["fluency"]), "correctness": int(row["correctness"])}
        assert rating.preferred is (row["answer"] == "A")
    assert (ratings.asked, ratings.missing, ratings.absent) == ("this one", {1: 0, 2: 0}, ())
    turned = filled(study, 0)[::-1]
    assert collect(study, both(study, tmp_path, turned)) == ratings
    assert Ratings.model_validate_json(ratings.model_dump_json()) == ratings


def test_what_spreadsheets_do_to_a_file_does_not_matter(study: Study, tmp_path: Path) -> None:
    expected = collect(study, both(study, tmp_path))
    rows = filled(study, 0)
    for row in rows:
        row["prompt"] = row["prompt"].replace("\n", "\r\n")
        row["preferred"] = {"1": "x", "0": ""}[row["preferred"]]
        row["fluency"] += ".0"
        row["correctness"] = f" {row['correctness']},0 "
    files = [saved(tmp_path / "excel.csv", rows, ";", "\ufeff"), both(study, tmp_path)[1]]
    files[0].write_bytes(files[0].read_bytes() + b";;;;;;;;\r\n")
    assert collect(study, files) == expected


def changed(rows: list[dict[str, str]], row: int, **cells: str) -> list[dict[str, str]]:
    rows[row] |= cells
    return rows


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"fluency": "11"}, r"back-0.csv row 5: fluency is '11', not a whole number from 1 to 10"),
        ({"fluency": "0"}, "fluency is '0'"),
        ({"fluency": "7.5"}, "fluency is '7.5'"),
        ({"fluency": "good"}, "fluency is 'good'"),
        ({"fluency": "nan"}, "fluency is 'nan'"),
        ({"correctness": "-1"}, "correctness is '-1', not a whole number from 0 to 3"),
        ({"preferred": "maybe"}, "row 5: preferred is 'maybe', not 1 or 0"),
        ({"prompt": "Note 9"}, "row 5: the prompt of 'r.*' is not what was given out"),
        ({"text": "a better answer"}, "row 5: the text of 'r.*' is not what was given out"),
        ({"id": "r000000000000"}, "row 5: id 'r000000000000' is none of this reader's"),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_what_is_wrong_is_told_with_file_and_row_whatever_is_allowed_to_miss(
    cells: dict[str, str], message: str, partial: bool, study: Study, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=message):
        collect(study, both(study, tmp_path, changed(filled(study, 0), 3, **cells)), partial)


def test_missing_rows_empty_cells_and_absent_readers_are_errors_or_with_partial_a_report(
    study: Study, tmp_path: Path
) -> None:
    rows = changed(filled(study, 0)[1:], 2, fluency="")  # item 1 loses A, its preferred; item 2's A its fluency
    files = both(study, tmp_path, rows)
    gone = study.packets[0][0].id
    with pytest.raises(InvalidInput) as error:
        collect(study, files)
    assert error.value.what.splitlines() == [
        f"{files[0]} row 4: fluency is empty",
        f"{files[0]}: item 1, answer A ('{gone}') is missing",
        f"{files[0]}: item 1 has no preferred answer (of equal ones mark each)",
    ]
    assert "--partial" in error.value.remedy
    ratings = collect(study, files, partial=True)
    assert ratings.missing == {1: 4, 2: 0}, "two scores of the row, one of another, an item's mark"
    whole = changed(filled(study, 0), 0, preferred="")
    item = {shown.id for shown in study.packets[0] if shown.item == 1}
    without = both(study, tmp_path, [row for row in whole if row["id"] not in item])
    assert collect(study, without, partial=True).missing[1] == 2 * len(item) + 1, "an item has one mark, or none"
    assert gone not in ratings.by_id
    assert ratings.by_id[study.packets[0][1].id].preferred is None, "nothing is known of this item's preference"
    assert ratings.by_id[study.packets[0][3].id].scores["fluency"] is None
    with pytest.raises(InvalidInput, match="not returned: reader 2"):
        collect(study, [saved(tmp_path / "one.csv", filled(study, 0))])
    assert collect(study, [saved(tmp_path / "one.csv", filled(study, 0))], partial=True).absent == (2,)


def test_what_spreadsheets_make_of_a_head_is_read_all_the_same(study: Study, tmp_path: Path) -> None:
    files = both(study, tmp_path)
    loud = [{name.capitalize(): cell for name, cell in row.items()} for row in filled(study, 0)]
    marked = saved(tmp_path / "marked.csv", loud, ";", "\ufeffsep=;\r\n")
    assert collect(study, [marked, files[1]]) == collect(study, files)
    wrong = changed(filled(study, 0), 3, fluency="99")
    with pytest.raises(InvalidInput, match=r"marked.csv row 6: fluency is '99'"):
        collect(study, [saved(marked, wrong, ";", "sep=;\r\n"), files[1]])


def test_rows_and_packets_that_come_twice_are_refused(study: Study, tmp_path: Path) -> None:
    rows = filled(study, 0)
    with pytest.raises(InvalidInput, match=r"row 23: id 'r.*' is there already, in row 2"):
        collect(study, both(study, tmp_path, [*rows, rows[0]]), partial=True)
    files = both(study, tmp_path)
    with pytest.raises(InvalidInput, match=r"again.csv: reader 1 has already returned .*back-0.csv"):
        collect(study, [*files, saved(tmp_path / "again.csv", rows)])


def test_all_that_is_wrong_is_told_at_once_and_no_more_than_fits(study: Study, tmp_path: Path) -> None:
    rows = [row | {"fluency": "99", "correctness": "99"} for row in filled(study, 0)]
    with pytest.raises(InvalidInput) as error:
        collect(study, both(study, tmp_path, rows))
    lines = error.value.what.splitlines()
    assert len(lines) == 26
    assert lines[-1] == "… and 17 more"


def test_a_file_that_is_no_packet_of_this_study_is_refused(study: Study, tmp_path: Path) -> None:
    other, _ = blind(DESIGN, PROMPTS, ARMS, "another")
    with pytest.raises(InvalidInput, match="holds no answer of this study"):
        collect(study, [saved(tmp_path / "other.csv", filled(other, 0))], partial=True)
    without = [{key: cell for key, cell in row.items() if key != "fluency"} for row in filled(study, 0)]
    with pytest.raises(InvalidInput, match="has no column fluency"):
        collect(study, [saved(tmp_path / "cut.csv", without)])
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InvalidInput, match="has no column id"):
        collect(study, [tmp_path / "empty.csv"])
    (tmp_path / "latin.csv").write_bytes(b"id,prompt\n1,caf\xe9\n")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        collect(study, [tmp_path / "latin.csv"])
    with pytest.raises(NotFound):
        collect(study, [tmp_path / "nowhere.csv"])


def test_ties_are_marked_on_each(study: Study, tmp_path: Path) -> None:
    rows = changed(filled(study, 0), 1, preferred="1")
    ratings = collect(study, both(study, tmp_path, rows))
    assert [ratings.by_id[shown.id].preferred for shown in study.packets[0][:3]] == [True, True, False]


def test_the_key_goes_through_its_file_unchanged() -> None:
    _, key = made()
    assert Key.model_validate(json.loads(key.as_file())) == key
    assert Key.model_validate_json(key.as_file()).sha256 == key.sha256
