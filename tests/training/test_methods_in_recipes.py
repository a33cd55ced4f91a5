"""Every method of the catalogue, chosen in a recipe, trained by it, stored, and loaded on a fresh base."""

from pathlib import Path
from typing import Any

import pytest
import torch

from infra.settings import get_settings
from tests.training.methods.test_contract import CASES
from tests.training.test_trainer_launch import TRAIN, VALIDATION, base, recipe
from training.adapter_files import attach_stored, read_adapter, write_adapter
from training.base_models import LoadedBase, load_base
from training.methods.catalog import CATALOG, get_method
from training.options import MethodChoice
from training.trainer import train_recipe

__all__ = ["base"]  # a fixture

OPTIONS = {case.method: case.options for case in reversed(CASES)}  # of each method the first case's


def reading(adapted: Any) -> torch.Tensor:
    adapted.model.eval()
    with torch.no_grad():
        return adapted.model(input_ids=torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("name", [name for name in CATALOG if "llama" in get_method(name).card.backbones])
def test_a_method_is_trained_by_a_recipe_stored_and_loaded(tmp_path: Path, base: LoadedBase, name: str) -> None:
    chosen = recipe(steps=12).model_copy(update={"method": MethodChoice(name=name, **OPTIONS[name])})
    adapted, outcome = train_recipe(
        chosen, base, TRAIN, VALIDATION, workdir=tmp_path / "run", on_event=lambda event: None
    )
    assert outcome.steps == 12
    write_adapter(
        tmp_path / "stored",
        adapted.save,
        method_name=name,
        base_identity=base.identity.sha256,
        base_reference=base.reference,
        recipe=chosen.as_stored(),
        metrics={},
    )
    assert read_adapter(tmp_path / "stored").method == name
    again = load_base(base.reference, cache=get_settings().base_models)
    loaded = attach_stored(again.model, tmp_path / "stored", base_identity=again.identity.sha256)
    torch.testing.assert_close(reading(loaded), reading(adapted), atol=1e-6, rtol=1e-6)


def test_a_start_is_computed_once_and_told(tmp_path: Path, base: LoadedBase) -> None:
    chosen = recipe(steps=2).model_copy(update={"method": MethodChoice(name="pissa", rank=2)})
    told: list[tuple[str, int, int]] = []

    def train(workdir: str, examples: list[Any]) -> None:
        fresh = load_base(base.reference, cache=get_settings().base_models)
        train_recipe(
            chosen,
            fresh,
            examples,
            VALIDATION,
            workdir=tmp_path / workdir,
            on_event=lambda event: None,
            on_preparing=lambda *progress: told.append(progress),
        )

    train("first", TRAIN)
    layers = len(told)
    assert told[-1] == ("principal components", layers, layers)
    train("second", TRAIN)
    assert len(told) == layers
    train("third", TRAIN[:8])  # other data: kept apart, though PiSSA reads none
    assert len(told) == 2 * layers
    assert len(list(get_settings().starts.glob("*.safetensors"))) == 2
