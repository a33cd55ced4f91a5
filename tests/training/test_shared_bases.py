"""Base models that are lent, come back bare, and are kept."""

from pathlib import Path

import pytest
import torch

from tests.tiny_models import save_tiny_llama
from training.base_models import load_base
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.shared_bases import SharedBases, shared_bases

CPU = torch.device("cpu")


@pytest.fixture
def references(tmp_path: Path) -> list[str]:
    return [f"path:{save_tiny_llama(tmp_path / str(seed), seed=seed)}" for seed in range(3)]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """References in the order in which they were loaded."""
    found: list[str] = []

    def load(reference: str, **options: object) -> object:
        found.append(reference)
        return load_base(reference, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("training.shared_bases.load_base", load)
    return found


def test_a_base_comes_back_bare_and_is_lent_again(tmp_path: Path, references: list[str], loads: list[str]) -> None:
    bases, lora = SharedBases(), get_method("lora")
    options = {"cache": tmp_path / "cache", "dtype": torch.float32, "device": CPU}
    for _ in range(2):
        with bases.lend(references[0], **options) as base:  # type: ignore[arg-type]
            lora.attach(base.model, lora.config_type(rank=2), AttachContext(), "default")
            with bases.lend(references[0], **options) as other:  # type: ignore[arg-type]
                assert other.model is not base.model, "nobody shares what another has attached to"
    assert len(loads) == 3, "one was kept, and once more one to share with"
    with pytest.raises(ZeroDivisionError), bases.lend(references[0], **options) as base:  # type: ignore[arg-type]
        lora.attach(base.model, lora.config_type(rank=2), AttachContext(), "default")
        raise ZeroDivisionError
    assert not any("lora" in name for name, _ in base.model.named_parameters())


def test_a_base_that_will_be_written_is_nobody_elses(tmp_path: Path, references: list[str], loads: list[str]) -> None:
    bases = SharedBases()
    for own in (True, False, False, True):
        with (
            bases.lend(references[0], cache=tmp_path / "cache", dtype=torch.float32, device=CPU, own=own) as base,
            torch.no_grad(),
        ):
            weight = base.model.get_input_embeddings().weight
            assert weight.abs().sum() > 0
            if own:
                weight.zero_()
    assert len(loads) == 3


def test_no_more_are_kept_than_wanted(tmp_path: Path, references: list[str], loads: list[str]) -> None:
    bases = SharedBases(most=2)
    for place in (0, 1, 0, 2, 0, 1):
        with bases.lend(references[place], cache=tmp_path / "cache", dtype=torch.float32, device=CPU):
            pass
    assert loads == [references[place] for place in (0, 1, 2, 1)]


def test_within_a_block_all_share() -> None:
    with shared_bases() as outer, shared_bases() as inner:
        assert inner is outer
    with shared_bases() as later:
        assert later is not outer
