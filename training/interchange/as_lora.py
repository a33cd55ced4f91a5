"""Any adapter as layers of a plain LoRA: exactly where it is one, at a lower rank and with a loss where it is not."""

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from infra.errors import InvalidInput, NotMergeable
from infra.files import require_free
from training.interchange.lora_layers import LoraLayer, LoraLayers, layers_from_peft, layers_to_peft
from training.interchange.truncation import Keep, Loss, Update, truncated
from training.interchange.weight_changes import (
    base_tensors,
    linear_changes,
    other_changes,
    parameters_of,
    sayable,
)
from training.methods.contract import Adapted, write_stored
from training.methods.peft_method import bare
from training.methods.plain_lora import low_rank_pairs
from training.methods.targets import linear_modules, require_room


def lora_layers(adapted: Adapted) -> dict[str, LoraLayer]:
    """The layers of an adapter whose update is of low rank, whatever its method; nothing is lost.

    Raises:
        InvalidInput: the update is not of low rank, or more than a change of linear layers' weights.
    """
    stored = adapted.adapter_config()
    if stored.get("peft_type") == "LORA" and not stored.get("use_dora"):
        return layers_from_peft(stored, {name: tensor.cpu() for name, tensor in adapted.tensors().items()})
    return {
        place: LoraLayer(A.detach().float().cpu(), B.detach().float().cpu())
        for place, (A, B) in low_rank_pairs(adapted).items()
    }


def lora_layers_at(adapted: Adapted, rank: int) -> tuple[dict[str, LoraLayer], Loss]:
    """The layers of the LoRA of that rank that is nearest to an adapter, and what is lost by it.

    Of an adapter that is of low rank already, its factors are cut; of any other that merges, each layer's change of
    weight, which takes memory for one more base model.

    Raises:
        InvalidInput: it changes what a LoRA cannot say (norms, biases, embeddings), named; or it changes nothing; or
            no layer has so high a rank.
        NotMergeable: its update is no change of weights.
    """
    require_room(linear_modules(bare(adapted.model)).values(), rank, "--rank")
    updates: Iterator[tuple[str, Update]]
    try:
        updates = iter(lora_layers(adapted).items())
    except InvalidInput:
        updates = _changes(adapted)
    layers, loss = truncated(updates, Keep(rank=rank))
    if not layers:
        raise InvalidInput(f"Adapter '{adapted.name}' changes no weight of a linear layer.", "Was it trained?")
    return layers, loss


def write_peft(layers: LoraLayers, model: nn.Module, directory: Path) -> None:
    """Write a plain LoRA as peft's folder.

    Args:
        layers: at least one.
        model: the bare base; may be on the meta device.
        directory: new or empty.

    Raises:
        Conflict: the directory holds something, or is none.
        BaseModelMismatch: a layer that the model does not have.
    """
    require_free(directory)
    write_stored(directory, *layers_to_peft(layers, model))


def _changes(adapted: Adapted) -> Iterator[tuple[str, Update]]:
    try:
        merged = adapted.merge()
    except NotMergeable as error:
        raise NotMergeable(error.what, "Export it as it is, without --rank.") from None
    before, after = base_tensors(adapted), parameters_of(merged)
    sayable(other_changes(merged, before, after))
    return linear_changes(merged, before, after)
