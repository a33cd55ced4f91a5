"""`regraft data`: rows of a pool become a data set that a recipe trains on."""

import json
import random
from pathlib import Path

import pytest
import yaml

from infra.settings import get_settings
from tests.cli.conftest import run_here
from tests.tiny_models import own_seed, save_tiny_llama

pytestmark = pytest.mark.services

WORDS = [
    "amber",
    "birch",
    "cedar",
    "dune",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "jetty",
    "knoll",
    "larch",
    "mesa",
    "north",
    "ocean",
    "pine",
    "quartz",
    "ridge",
]


@pytest.fixture
def pool(tmp_path: Path, regraft_home: Path) -> Path:
    """120 rows: sums, animals and noise; two of them twice."""
    get_settings.cache_clear()
    rng = random.Random(0)
    rows = [f"{rng.randint(1, 99)} plus {rng.randint(1, 99)} is asked in sum {number}" for number in range(40)]
    rows += [f"The {rng.choice(WORDS)} fox and the {rng.choice(WORDS)} hare ran past {number}" for number in range(40)]
    rows += [" ".join(rng.choice(WORDS) for _ in range(8)) + f" {number}" for number in range(38)]
    rows += [rows[0].upper(), rows[50]]
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


@pytest.fixture
def target(tmp_path: Path) -> Path:
    file = tmp_path / "target.jsonl"
    file.write_text("".join(json.dumps({"text": f"{a} plus {a + 3} is asked in sum"}) + "\n" for a in range(5, 25)))
    return file


def select(pool: Path, *more: str) -> dict:
    done = run_here("data", "select", str(pool), *more, "--json")
    assert (done.code, done.err) == (0, ""), done.err
    return json.loads(done.out)


def test_rows_like_the_target_are_kept_with_scores_and_origins(pool: Path, target: Path, tmp_path: Path) -> None:
    said = ("--target", str(target), "--budget", "20", "--as", "sums")
    selected = select(pool, *said)
    assert selected["again"] is False
    assert (selected["address"], selected["rows"], selected["pool"], selected["duplicates"]) == ("sums@1", 20, 120, 2)
    again = select(pool, *said)
    assert (again["address"], again["again"]) == ("sums@1", True), "the same choice of the same rows"
    assert "found again" in run_here("data", "select", str(pool), *said).out
    assert "found again" not in run_here("data", "select", str(pool), *said, "--set", "seed=4").out
    nowhere = run_here("data", "export", "sums", str(tmp_path / "nowhere" / "out.jsonl"))
    assert nowhere.code == 3 and "nowhere is not there" in "".join(nowhere.err.split("\n"))
    out = tmp_path / "out.jsonl"
    assert run_here("data", "export", "sums", str(out)).code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all("plus" in row["text"] for row in rows)
    assert [row["row"] for row in rows] == sorted(row["row"] for row in rows), "in the pool's order"
    lines = pool.read_text().splitlines()
    assert all(json.loads(lines[row["row"] - 1])["text"] == row["text"] for row in rows)
    assert {row["source"] for row in rows} == {str(pool)}
    page = Path(selected["page"]).read_text()
    assert page.count("<svg") == 2 and "not chosen" in page
    shown = run_here("data", "show", "sums@1")
    assert shown.code == 0 and "20 of 120" in shown.out and "nothing yet" in shown.out


@pytest.mark.parametrize("method", ["dsir", "nearest", "k-centre", "random"])
def test_every_method_keeps_as_many_as_it_should(pool: Path, target: Path, method: str) -> None:
    like = ("--target", str(target)) if method in ("dsir", "nearest") else ()
    selected = select(pool, *like, "--method", method, "--budget", "25", "--as", f"by-{method}")
    assert selected["rows"] == 25 and selected["method"] == method


def test_pieces_of_evaluation_items_and_near_copies_are_left_out(pool: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    texts = [json.loads(line)["text"] for line in pool.read_text().splitlines()]
    items = (texts[3], texts[60], "not in it at all")
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in items))
    with pool.open("a") as file:
        file.write(json.dumps({"text": f"so: {' '.join(WORDS)} one"}) + "\n")
        file.write(json.dumps({"text": f"so: {' '.join(WORDS)} two"}) + "\n")
    said = ("--deduplicate", "near", "--method", "random", "--budget", "30", "--as", "clean")
    selection = tmp_path / "selection.yaml"
    content = {"pool": pool.name, "decontaminate": [{"file": held_out.name, "columns": {"text": "text"}}]}
    selection.write_text(yaml.safe_dump(content))
    done = run_here("data", "select", "--file", str(selection), *said, "--json")
    assert (done.code, done.err) == (0, "")
    selected = json.loads(done.out)
    assert (selected["duplicates"], selected["contaminated"]) == (3, 2)
    assert selected["evaluation_sets"] == [{"set": "held-out.jsonl", "items": 3, "hit": 2}]
    assert "a piece of 2 of 3 items" in run_here("data", "select", "--file", str(selection), *said).out


def test_what_is_left_out_is_told_once(pool: Path) -> None:
    with pool.open("a") as file:
        file.write('{"text": 5}\n{"text": ""}\n')
    said = ("--method", "random", "--budget", "5", "--set", "on_bad=skip", "--as", "some")
    told = " ".join(run_here("data", "select", str(pool), *said).err.split())
    assert told.count("pool.jsonl line 121: text is int, not text") == 1
    assert "2 of 122 rows are left out" in told


def test_tests_of_programs_and_choices_are_kept(tmp_path: Path, regraft_home: Path) -> None:
    get_settings.cache_clear()
    file = tmp_path / "programs.jsonl"
    rows = [
        {"prompt": f"f{n}", "completion": f"f{n} = {n}", "checks": f"assert f{n} == {n}", "options": [f"f{n} = {n}"]}
        for n in range(6)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = ("--set", "columns={tests: checks, choices: options}", "--method", "random", "--budget", "6", "--as", "code")
    select(file, *said)
    from flows.data_sets import readable
    from training.data.sources import DataSource, read_examples

    kept = read_examples(readable(DataSource(selected="code@1")))
    assert [(each.prompt, each.tests, each.choices) for each in kept] == [
        (row["prompt"], row["checks"], tuple(row["options"])) for row in rows
    ]


def test_what_a_base_model_finds_least_surprising_is_kept(pool: Path, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "data-llama", seed=own_seed(__name__))
    selected = select(pool, "--method", "perplexity", "--base", f"path:{base}", "--share", "0.25", "--as", "plain")
    assert selected["rows"] == 118 // 4


def test_a_recipe_trains_on_it_and_is_linked(tmp_path: Path, regraft_home: Path) -> None:
    get_settings.cache_clear()
    file = tmp_path / "pool.jsonl"
    rows = [{"question": f"{a} + {b}?", "answer": str(a + b)} for a in range(9) for b in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--set", "columns.prompt=question", "--set", "columns.completion=answer", "--set", "columns.text=null")
    selected = select(file, *columns, "--method", "random", "--budget", "60", "--as", "additions")
    recipe = tmp_path / "recipe.yaml"
    content = {
        "adapter": "adding",
        "base": f"path:{save_tiny_llama(tmp_path / 'data-llama', seed=own_seed(__name__))}",
        "data": {"selected": "additions"},
        "training": {"steps": 2, "batch_size": 2},
        "migration_kit": False,
    }
    recipe.write_text(yaml.safe_dump(content))
    trained = run_here("train", str(recipe), "--json")
    assert (trained.code, trained.err) == (0, "")
    version = json.loads(trained.out)["address"]
    told = json.loads(run_here("data", "show", "additions", "--json").out)
    assert told["versions"] == [version] and told["data_set"]["address"] == selected["address"]
    from registry import AdapterRegistry

    record = AdapterRegistry().get(version)
    assert record.recipe["data"]["selected"] == "additions@1", "the name is pinned"
    assert record.dataset is not None and record.dataset.drawn_from == "additions@1"
    family = run_here("lineage", version).out.splitlines()
    assert "data set additions@1" in family[0] and "60 rows" in family[0]
    assert f"made_from → {version}" in family[1] and len(family) == 2
    assert run_here("evaluate", version).code == 0, "its test split comes of the kept rows"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--budget", "10"), "got-d needs a target"),
        (("--method", "dsirr", "--budget", "5"), "method"),
        (("--method", "random"), "random needs a budget"),
        (("--method", "random", "--budget", "119"), "only 118 are left to choose from"),
        (("--method", "random", "--budget", "5", "--share", "0.1"), "share goes with perplexity, not with random"),
        (("--method", "perplexity"), "perplexity needs a base"),
        (("--method", "random", "--budget", "5", "--set", "columns.text=body"), "has no column 'body'"),
        (("--method", "random", "--budget", "5", "--decontaminate", "no-such-file.jsonl"), "no-such-file.jsonl"),
        (("--method", "dsir", "--budget", "5", "--target", "nothing"), "There is no data set 'nothing'"),
        (("--method", "dsir", "--budget", "5", "--target", "object_countin"), "Did you mean 'object_counting'?"),
        (("--method", "perplexity", "--base", "b", "--share", "0"), "share: Input should be greater than 0"),
        (("--method", "random", "--budget", "5", "--decontaminate", "navigate", "--set", "decontaminate=[]"), "twice"),
        (("--decontaminate", "navigate", "--set", "decontaminate.file=x.jsonl"), "decontaminate is a list"),
    ],
)
def test_what_cannot_be_selected_is_told_and_keeps_nothing(pool: Path, more: tuple[str, ...], message: str) -> None:
    before = run_here("data", "list", "--json").out
    refused = run_here("data", "select", str(pool), *more, "--as", "never")
    assert refused.code == 2 or "There is no" in refused.err or "not there" in refused.err
    assert message in " ".join(refused.err.split())
    assert run_here("data", "list", "--json").out == before


def test_a_pool_that_is_not_there_or_has_no_name_is_told(tmp_path: Path, regraft_home: Path) -> None:
    get_settings.cache_clear()
    said = ("--method", "random", "--budget", "5")
    assert "is not there" in run_here("data", "select", str(tmp_path / "none.jsonl"), *said, "--as", "x").err
    assert "--as NAME" in run_here("data", "select", "pool.jsonl", *said).err
    assert "pool" in run_here("data", "select", *said, "--as", "x").err
    (tmp_path / "empty.jsonl").write_text("")
    empty = run_here("data", "select", str(tmp_path / "empty.jsonl"), *said, "--as", "x")
    assert empty.code == 2 and "pool is empty" in empty.err


def test_workers_of_a_cluster_select_what_threads_do(pool: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prefect_ray")
    said = ("--target", str(target), "--budget", "20", "--set", "shard_rows=40")
    here = select(pool, *said, "--as", "here")
    monkeypatch.setenv("REGRAFT_RAY", "local:2")
    get_settings.cache_clear()
    there = run_here("data", "select", str(pool), *said, "--as", "there", "--json")
    monkeypatch.delenv("REGRAFT_RAY")
    get_settings.cache_clear()
    one, other = (json.loads(run_here("data", "show", name, "--json").out)["data_set"] for name in ("here", "there"))
    assert one["fingerprint"] == other["fingerprint"] and one["origin"] == other["origin"]
    assert (there.code, here["rows"], json.loads(there.out)["rows"]) == (0, 20, 20)
