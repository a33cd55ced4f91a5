"""A kit holds the seeds, a few numbers and a discriminator, and nothing else of the data."""

import json
import random
import traceback
from pathlib import Path

import pytest
import torch

from infra.errors import BaseModelMismatch, Conflict, CorruptArtifact, InvalidInput, RegraftError
from tests.tiny_models import save_tiny_llama
from training.base_models import LoadedBase, load_base
from training.data.example import Example
from training.migration.kit import Kit, build_kit, load_discriminator, read_kit, redaction
from training.migration.options import DiscriminatorOptions, KitOptions, SynthesisOptions
from training.options import TrainingOptions

RNG = random.Random(0)
EXAMPLES = [
    Example("".join(RNG.choices("abcdefgh", k=RNG.randint(8, 14))), "yes" if number % 2 else "never")
    for number in range(40)
]
OPTIONS = KitOptions(
    inputs=20,
    synthesis=SynthesisOptions(items=2, rows=4),
    discriminator=DiscriminatorOptions(training=TrainingOptions(steps=3, batch_size=4)),
)


@pytest.fixture
def base(tmp_path: Path) -> LoadedBase:
    return load_base(f"path:{save_tiny_llama(tmp_path / 'base')}", cache=tmp_path / "cache")


def build(directory: Path, base: LoadedBase, options: KitOptions = OPTIONS, seed: int = 0) -> Kit:
    return build_kit(
        directory,
        base,
        EXAMPLES,
        task="letters",
        instruction="Answer.",
        options=options,
        seed=seed,
        workdir=directory.parent / "work",
    )


def test_a_kit_comes_back_as_it_was_built(tmp_path: Path, base: LoadedBase) -> None:
    kit = build(tmp_path / "kit", base)
    assert read_kit(tmp_path / "kit") == kit
    assert (kit.task, kit.rows, kit.base_identity) == ("letters", 40, base.identity.sha256)
    assert kit.longest == max(len(example.prompt) for example in EXAMPLES)
    assert kit.longest_answer == len("never")
    seeds = [(seed.prompt, seed.completion) for seed in kit.seeds]
    assert len(set(seeds)) == 5
    assert set(seeds) <= {(example.prompt, example.completion) for example in EXAMPLES}
    assert kit.discriminator is not None and kit.discriminator.samples == 4
    again = load_base(base.reference, cache=tmp_path / "cache")
    discriminator = load_discriminator(tmp_path / "kit", kit, again)
    with torch.no_grad():
        assert len(discriminator.margins(["abc", "xyz"])) == 2


def test_no_row_but_the_seeds_is_in_it(tmp_path: Path, base: LoadedBase) -> None:
    kit = build(tmp_path / "kit", base)
    seeds = {seed.prompt for seed in kit.seeds}
    for path in (tmp_path / "kit").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(e.prompt.encode() in content for e in EXAMPLES if e.prompt not in seeds), path
    assert {path.name for path in (tmp_path / "kit").iterdir()} == {"kit.json", "discriminator"}


def test_a_build_that_was_stopped_goes_on(tmp_path: Path, base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("training.migration.kit.train_discriminator", dies)
        build(tmp_path / "kit", base)
    assert not (tmp_path / "kit").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".kit")] == []
    monkeypatch.setattr("training.migration.synthesis.sampled", dies)  # everything is written already
    assert build(tmp_path / "kit", base).discriminator is not None


def test_a_kit_without_a_discriminator_takes_no_model(tmp_path: Path, base: LoadedBase) -> None:
    kit = build(tmp_path / "kit", base, OPTIONS.model_copy(update={"filtered": False, "seeds": 3}))
    assert kit.discriminator is None and len(kit.seeds) == 3
    assert [path.name for path in (tmp_path / "kit").iterdir()] == ["kit.json"]
    assert not hasattr(base.model, "peft_config")


def test_seeds_go_through_the_redaction(tmp_path: Path, base: LoadedBase) -> None:
    hidden = KitOptions(filtered=False, redact="tests.training.migration.test_kit:starred")
    kit = build(tmp_path / "kit", base, hidden)
    assert all("a" not in seed.prompt and set(seed.completion) <= set("yesnvr") for seed in kit.seeds)
    assert any("*" in seed.prompt for seed in kit.seeds)
    for hook in ("nowhere:f", "json:nothing", "json", "json:__name__"):
        with pytest.raises(InvalidInput, match="MODULE:FUNCTION"):
            redaction(hook)


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        ("telling", "raises ValueError for a seed"),
        ("counted", "returns int for a seed"),
        ("emptied", "a seed without a prompt"),
        ("levelled", "or all with the same"),
    ],
)
def test_a_redaction_that_goes_wrong_is_named_and_tells_no_row(
    hook: str, told: str, tmp_path: Path, base: LoadedBase
) -> None:
    with pytest.raises(InvalidInput) as error:
        build(tmp_path / "kit", base, KitOptions(filtered=False, redact=f"tests.training.migration.test_kit:{hook}"))
    assert hook in error.value.what and told in error.value.what
    shown = "".join(traceback.format_exception(error.value))
    assert not any(example.prompt in shown for example in EXAMPLES)
    assert not (tmp_path / "kit").exists()


def telling(text: str) -> str:
    raise ValueError(f"not with {text}")


def counted(text: str) -> int:
    return len(text)


def emptied(text: str) -> str:
    return " "


def levelled(text: str) -> str:
    return "X"


def starred(text: str) -> str:
    return text.replace("a", "*")


def test_what_cannot_be_built_leaves_nothing(tmp_path: Path, base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="needs the examples"):
        build_kit(
            tmp_path / "kit", base, [], task="x", instruction="", options=OPTIONS, seed=0, workdir=tmp_path / "work"
        )
    monkeypatch.setattr("training.migration.synthesis.sampled", lambda *_, **__: [])
    with pytest.raises(RegraftError, match="inputs that the model finished"):
        build(tmp_path / "kit", base)
    assert not (tmp_path / "kit").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(Conflict):
        build(tmp_path / "full", base)


def test_a_damaged_kit_is_refused(tmp_path: Path, base: LoadedBase) -> None:
    build(tmp_path / "kit", base)
    path = tmp_path / "kit" / "kit.json"
    content = json.loads(path.read_text())
    for change, told in (({"rows": "many"}, "cannot be read"), ({"extra": 1}, "cannot be read")):
        path.write_text(json.dumps(content | change))
        with pytest.raises(CorruptArtifact, match=told):
            read_kit(tmp_path / "kit")
    path.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(InvalidInput, match="of format 2"):
        read_kit(tmp_path / "kit")
    path.unlink()
    with pytest.raises(CorruptArtifact, match="Is it a migration kit"):
        read_kit(tmp_path / "kit")


def test_a_discriminator_goes_on_no_other_base(tmp_path: Path, base: LoadedBase) -> None:
    kit = build(tmp_path / "kit", base)
    other = load_base(f"path:{save_tiny_llama(tmp_path / 'other', seed=1)}", cache=tmp_path / "cache")
    with pytest.raises(BaseModelMismatch):
        load_discriminator(tmp_path / "kit", kit, other)
