"""`regraft study`: made, returned and analysed; resumed, and never changed once it is there."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from infra.settings import get_settings
from tests.cli.conftest import WriteRecipe, run_here
from tests.cli.test_lifecycle import clean
from tests.tiny_models import own_seed, save_tiny_llama

PROMPTS = [f"Summarise note {number}." for number in range(12)]
DESIGN = "title: Notes\ncriteria:\n  - {name: fluency, high: 5}\n  - {name: correctness, question: 'Is it right?'}\n"


@pytest.fixture
def files(tmp_path: Path, home: Path) -> dict[str, Path]:
    """Answers of two arms, one of them better, and the prompts with reference answers."""
    rows = {
        "quark": [{"prompt": prompt, "answer": f"fine {place}"} for place, prompt in enumerate(PROMPTS)],
        "xylo": [{"prompt": prompt, "answer": f"poor {place}"} for place, prompt in enumerate(PROMPTS[::-1])],
        "prompts": [{"prompt": prompt, "completion": f"true {place}"} for place, prompt in enumerate(PROMPTS)],
    }
    paths = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    paths["design"] = tmp_path / "design.yaml"
    paths["design"].write_text(DESIGN)
    return paths


def create(folder: Path, files: dict[str, Path], *more: str, code: int = 0) -> Any:
    arms = ("--answers", f"quark={files['quark']}", "--answers", f"xylo={files['xylo']}")
    told = run_here("study", "create", str(folder), *arms, "--design", str(files["design"]), *more, "--json")
    assert told.code == code, told.err
    return told.err if code else json.loads(told.out)


def returned(packet: Path, to: Path) -> Path:
    """As a reader fills it in to whom fine answers look better."""
    text = (packet / "ratings.csv").read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for row in rows:
        fine = row["text"].startswith("fine")
        row |= {"fluency": "5" if fine else "3", "correctness": "8" if fine else "4", "preferred": str(int(fine))}
    with to.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return to


def test_a_study_from_files_is_made_collected_and_analysed(files: dict[str, Path], tmp_path: Path) -> None:
    made = create(tmp_path / "study", files, "--readers", "2")
    assert (made["arms"], made["items"], made["alike"], made["already"]) == (["quark", "xylo"], 12, 0, False)
    packets = [Path(packet) for packet in made["packets"]]
    for packet in packets:
        assert sorted(path.name for path in packet.iterdir()) == ["form.html", "ratings.csv"]
        held = "".join(path.read_text(encoding="utf-8-sig") for path in packet.iterdir())
        assert "quark" not in held
        assert "xylo" not in held
    back = [str(returned(packet, tmp_path / f"{packet.name}.csv")) for packet in packets]
    collected = json.loads(clean(run_here("study", "collect", str(tmp_path / "study"), *back, "--json")))
    assert collected == {"answers": 48, "missing": {"1": 0, "2": 0}, "absent": []}
    found = json.loads(clean(run_here("study", "analyse", str(tmp_path / "study"), "--json")))
    assert {(mean["measure"], mean["arm"]): mean["value"] for mean in found["means"]} == {
        ("fluency", "quark"): 5,
        ("fluency", "xylo"): 3,
        ("correctness", "quark"): 8,
        ("correctness", "xylo"): 4,
        ("preferred", "quark"): 1,
        ("preferred", "xylo"): 0,
    }
    assert all(d["wins"] == 12 and d["corrected"] == pytest.approx(3 * 2 / 2**12) for d in found["differences"])
    assert {a["alpha"] for a in found["agreement"] if a["measure"] != "preferred"} == {1.0}
    assert json.loads((tmp_path / "study" / "findings.json").read_text()) == found
    page = (tmp_path / "study" / "findings.html").read_text()
    assert page.count("<svg") == 3
    told = clean(run_here("study", "analyse", str(tmp_path / "study"), width=140))
    assert "quark – xylo" in told
    assert "12, 0, 0" in told
    assert "standard deviations" in told, "twelve items are few"


def test_what_comes_back_incomplete_is_refused_and_nothing_is_kept(files: dict[str, Path], tmp_path: Path) -> None:
    study = tmp_path / "study"
    packets = [Path(packet) for packet in create(study, files, "--readers", "2")["packets"]]
    back = returned(packets[0], tmp_path / "back.csv")
    back.write_text("".join(back.read_text().splitlines(keepends=True)[:-1]))
    told = run_here("study", "collect", str(study), str(back))
    assert told.code == 2
    assert "item 12, answer B" in told.err
    assert "not returned: reader 2" in told.err
    assert not (study / "ratings.json").exists()
    assert run_here("study", "analyse", str(study)).code == 3
    partial = clean(run_here("study", "collect", str(study), str(back), "--partial"))
    assert "Not returned: reader 2" in partial
    assert "Reader 1: " in partial
    assert run_here("study", "analyse", str(study)).code == 0


def test_the_same_command_finds_the_same_study_and_another_one_is_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    study = tmp_path / "study"
    made = create(study, files, "--reference", "--prompts", str(files["prompts"]))
    assert made["arms"] == ["quark", "xylo", "reference"]
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    (study / "packets" / "reader-1" / "form.html").unlink()
    again = create(study, files, "--reference", "--prompts", str(files["prompts"]))
    assert again == made | {"already": True}
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before
    assert "its packets may be with the readers" in " ".join(create(study, files, "--readers", "4", code=4).split())
    table = study / "packets" / "reader-2" / "ratings.csv"
    table.write_bytes(table.read_bytes().replace(b"fine", b"good"))
    assert "is not as it was made" in create(study, files, "--reference", "--prompts", str(files["prompts"]), code=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    assert "is not empty" in create(tmp_path / "full", files, code=4)


def test_a_study_of_the_same_data_and_options_does_not_unblind_another(files: dict[str, Path], tmp_path: Path) -> None:
    keys = []
    for name in ("own", "dummy"):
        create(tmp_path / name, files)
        keys.append(json.loads((tmp_path / name / "key.json").read_text()))
        held = [path.read_text(encoding="utf-8-sig") for path in (tmp_path / name / "packets").rglob("*.*")]
        assert not any(keys[-1]["secret"] in text for text in [*held, (tmp_path / name / "study.json").read_text()])
    assert len(keys[0]["answers"]) == 72
    assert not keys[0]["answers"].keys() & keys[1]["answers"].keys()


def test_an_interrupted_creation_goes_on_with_the_same_packets(files: dict[str, Path], tmp_path: Path) -> None:
    study = tmp_path / "study"
    made = create(study, files)
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    (study / "study.json").unlink()
    assert create(study, files) == made
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_ratings_that_were_changed_are_not_analysed(files: dict[str, Path], tmp_path: Path) -> None:
    study = tmp_path / "study"
    packets = [Path(packet) for packet in create(study, files, "--readers", "1")["packets"]]
    clean(run_here("study", "collect", str(study), str(returned(packets[0], tmp_path / "back.csv"))))
    ratings = study / "ratings.json"
    ratings.write_text(
        ratings.read_text().replace('"fluency":5', '"fluency":4', 1).replace('"fluency": 5', '"fluency": 4', 1)
    )
    told = run_here("study", "analyse", str(study))
    assert told.code == 5
    assert "not the ratings that were collected" in told.err
    assert "Collect again" in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--answers", "quark=other.jsonl"), "same name"),
        (("--answers", "other"), "not NAME=FILE"),
        (("--reference",), "no reference answer"),
        (("--answers", "short=short.jsonl"), "short has no answer to 11 of 12 items"),
        (("--prompts", "quark.jsonl", "--task", "navigate"), "one source of items"),
    ],
)
def test_arms_that_do_not_fit_are_refused_and_nothing_is_made(
    arguments: tuple[str, ...], message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "short.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "answer": "x"}) + "\n")
    assert message in " ".join(create(tmp_path / "study", files, *arguments, code=2).split())
    assert not (tmp_path / "study").exists()


@pytest.mark.services
def test_a_version_answers_and_an_interrupted_creation_goes_on(
    regraft_home: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    get_settings.cache_clear()
    base = f"path:{save_tiny_llama(tmp_path / 'study-base', seed=own_seed(__name__))}"
    recipe = write_recipe("read", base=base)
    clean(run_here("train", str(recipe), "--no-evaluate", "--json"))
    study = tmp_path / "study"
    arguments = ("read@1", "--reference", "--items", "9", "--max-new-tokens", "6", "--readers", "2")
    made = json.loads(clean(run_here("study", "create", str(study), *arguments, "--json")))
    assert (made["arms"], made["items"]) == (["read@1", "reference"], 9)
    held = "".join(p.read_text(encoding="utf-8-sig") for p in (study / "packets").rglob("*") if p.is_file())
    assert "read@" not in held
    blind_half = (study / "study.json").read_text()
    assert "read@" not in blind_half

    from serving.loading import load

    asked = {shown["id"]: shown for packet in json.loads(blind_half)["packets"] for shown in packet}
    key = json.loads((study / "key.json").read_text())
    own = [asked[name] for name, place in key["answers"].items() if (place["reader"], place["arm"]) == (0, 0)]
    assert load("read@1").generate([shown["prompt"] for shown in own], 6) == [shown["text"] for shown in own]

    kept = {path: path.stat().st_mtime_ns for path in (study / "answers").iterdir()}
    assert len(kept) == 1
    (study / "study.json").unlink()
    again = json.loads(clean(run_here("study", "create", str(study), *arguments, "--json")))
    assert again == made
    assert (study / "study.json").read_text() == blind_half
    assert {path: path.stat().st_mtime_ns for path in (study / "answers").iterdir()} == kept
    assert run_here("study", "create", str(tmp_path / "none"), "nobody@1", "read@1").code == 3
