"""An encoder through the command line: trained, judged by perplexity, promoted; what it cannot do is said."""

import json
from pathlib import Path

import pytest
import yaml

from infra.settings import get_settings
from tests.cli.conftest import run_here
from tests.tiny_models import own_seed, save_tiny_llama, save_tiny_masked

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, regraft_home: Path) -> Path:
    get_settings.cache_clear()
    folder = tmp_path_factory.mktemp("encoder")
    words = ("ab", "ba", "aab", "bba")
    lines = [json.dumps({"text": f"{one} {other} {one} {number}"}) for one in words for other in words
             for number in range(3)]  # fmt: skip
    (folder / "texts.jsonl").write_text("\n".join(lines))
    content = {
        "adapter": "language",
        "base": f"path:{save_tiny_masked(folder / 'base')}",
        "method": {"name": "small-models-lrl", "reduction": 4, "invertible": True},
        "data": {"file": "texts.jsonl", "columns": {"text": "text"}},
        "training": {"steps": 4, "batch_size": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_encoder_is_trained_judged_and_promoted(recipe: Path) -> None:
    trained = run_here("train", str(recipe), "--json")
    assert (trained.code, trained.err) == (0, "")
    version = json.loads(trained.out)
    assert [e["metric"] for e in version["evaluations"]] == ["perplexity"]
    assert version["method"] == "small-models-lrl"
    promoted = run_here("promote", version["address"], "--to", "challenger", "--json")
    assert promoted.code == 0, promoted.err
    generated = run_here("generate", version["address"], "hello")
    assert generated.code == 2 and "stands on a masked language model" in generated.err


def test_a_suite_that_an_encoder_cannot_answer_is_refused_before_training(recipe: Path) -> None:
    refused = run_here("train", str(recipe), "--set", "evaluation=[{metric: exact_match}]")
    assert refused.code == 2 and "is judged by the perplexity of what is hidden" in refused.err


def test_a_causal_model_learns_plain_text_whole(recipe: Path, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "texts-llama", seed=own_seed(__name__))
    more = (
        "--set",
        f"base=path:{base}",
        "--set",
        "method=lora",
        "--set",
        "adapter=texts",
        "--set",
        "training.steps=60",
    )
    trained = run_here("train", str(recipe), *more, "--set", "training.learning_rate=0.01", "--json")
    assert (trained.code, trained.err) == (0, "")
    version = json.loads(trained.out)
    (learnt,) = version["evaluations"]
    assert learnt["metric"] == "perplexity"
    assert learnt["value"] < 100, "as likely as one of 400 tokens before"
    assert version["migration_kit"] is None
    refused = run_here("kit", "build", version["address"])
    assert refused.code == 2 and "was trained on plain text" in " ".join(refused.err.split())
