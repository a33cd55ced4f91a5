"""What a client does in a round: a fresh LoRA of its own rank, trained on its own examples alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from infra.errors import BaseModelMismatch, RegraftError
from infra.settings import get_settings
from training.base_models import LoadedBase, load_base
from training.data.example import Example
from training.device import Precision, base_dtype, best_device
from training.federation.start import CommonStart
from training.interchange.lora_layers import fold, layers_from_peft
from training.merging.adapter import Adapter
from training.methods.borrowing import borrowed
from training.progress import OnEvent
from training.recipe import Recipe
from training.trainer import train_recipe

TRAINING = "training"  # the folder, in a client's of the round, that a training that was stopped goes on from


class Clients(Protocol):
    """All clients of a federation, wherever they run."""

    def train(self, number: int, wanted: Sequence[int], whole: Adapter | None) -> Iterator[tuple[int, Adapter | str]]:
        """What each of the `wanted` hands in, as it comes; or what went wrong with it.

        Args:
            number: of the round, from 1.
            wanted: clients, from 0, in ascending order.
            whole: the global adapter that they train on top of; none in the first round.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; what was done is kept.
        """
        ...


def folder(workdir: Path, number: int, client: int) -> Path:
    """Where what a client makes in a round lies."""
    return workdir / f"round-{number}-client-{client}"


def folded_base(reference: str, identity: str, precision: Precision, whole: Adapter | None) -> LoadedBase:
    """A copy of the base, for the clients alone, with the global adapter folded in; in float32, which holds it.

    Args:
        reference: see `load_base`.
        identity: sha256 that the base must have.
        precision: as a recipe's `training.precision`.
        whole: the global adapter; none before there is one.

    Raises:
        BaseModelMismatch: the reference leads to another base here.
    """
    device = best_device()
    dtype = base_dtype(device, precision, trained=True)
    base = load_base(reference, cache=get_settings().base_models, dtype=dtype, device=device)
    if base.identity.sha256 != identity:
        raise BaseModelMismatch(
            f"{reference} is {base.identity.sha256[:12]}… here; the federation trains on {identity[:12]}….",
            "Give every client the same base model.",
        )
    if whole is not None:
        fold(layers_from_peft(dict(whole.config), whole.tensors), base.model)
    return base


def train_client(
    recipe: Recipe,
    base: LoadedBase,
    examples: Sequence[Example],
    workdir: Path,
    on_event: OnEvent,
    start: CommonStart | None = None,
) -> Adapter:
    """What a client hands in: s·BA of every layer, that it learnt on top of `base`, which is left as it was.

    Args:
        recipe: method (a LoRA of the client's own rank), training options and seed.
        base: as `folded_base` gives it.
        examples: the client's own.
        workdir: for checkpoints; one that was stopped goes on from there.
        on_event: hears of every step.
        start: what all clients of the round begin with; none: each with a draw of its own.

    Raises: what `train_recipe` does.
    """
    with borrowed(base.model):
        adapted, _ = train_recipe(
            recipe,
            base,
            examples,
            (),
            workdir=workdir,
            on_event=on_event,
            on_preparing=lambda what, done, total: None,
            start=start,
        )
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in adapted.tensors().items()}
        return Adapter(recipe.adapter, adapted.adapter_config(), tensors)


def told(error: Exception) -> str:
    """What went wrong with a client, in a sentence: whatever it was, the others are not stopped by it."""
    if isinstance(error, RegraftError):
        return error.what
    if isinstance(error, torch.OutOfMemoryError):
        return "The GPU ran out of memory."
    return f"{type(error).__name__}: {error}"
