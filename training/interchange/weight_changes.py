"""What differs between two models of one class: an adapter merged and its base, a fine-tuned model and its base."""

from collections.abc import Iterator, Mapping

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import BaseModelMismatch, InvalidInput
from training.methods.contract import Adapted
from training.methods.peft_method import bare
from training.methods.targets import bare_modules, linear_modules


def base_tensors(adapted: Adapted) -> dict[str, Tensor]:
    """The bare base's parameters under an adapter, by the names that `Adapted.merge` gives them; not copied."""
    with adapted.disabled():  # a method that trains the base's own tensors has θ₀ in their place now
        found = {}
        for name, module in bare_modules(bare(adapted.model)):
            if isinstance(module, AuxiliaryTrainingWrapper) or ".modules_to_save" in name:
                continue
            place = name.replace(".original_module", "")
            for parameter, tensor in module.named_parameters(recurse=False):
                found[f"{place}.{parameter}" if place else parameter] = tensor.data
        return found


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """A plain model's parameters by name, tied ones under each of theirs; not copied."""
    return {name: tensor.data for name, tensor in model.named_parameters(remove_duplicate=False)}


def linear_changes(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """ΔW [m, n], in float32, of each linear layer whose weight differs, by its name; one at a time.

    Args:
        model: a plain model of the class that both are of; tells which tensors are weights of linear layers.
        before: the base's tensors.
        after: the same tensors, changed.
    """
    for place, layer in _linear_weights(model).items():
        old, new = before[place], after[place]
        if not torch.equal(old, new):
            change = (new.double() - old.double()).float()
            yield place.removesuffix(".weight"), change.T if isinstance(layer, Conv1D) else change


def other_changes(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """‖Δθ‖_F / ‖θ‖_F of whatever differs and is no linear layer's weight; 1 for what is new or was zero.

    A head that is tied to the embeddings is theirs: no LoRA on it could leave them as they are.

    Raises:
        BaseModelMismatch: a tensor is missing, or has another shape: not the same class and size of model.
    """
    weights = _linear_weights(model)
    for name, old in before.items():
        if name not in after or after[name].shape != old.shape:
            there = tuple(after[name].shape) if name in after else "missing"
            raise BaseModelMismatch(
                f"{name} is {tuple(old.shape)} in the base and {there} in the model.",
                "Name the base that it was made from; tokens that were added must be taken out first.",
            )
    changed = {}
    for name, new in after.items():
        if name in weights:
            continue
        old = before.get(name, torch.zeros_like(new))
        if name not in before or not torch.equal(old, new):
            norm, change = (float(torch.linalg.vector_norm(tensor.double())) for tensor in (old, new - old))
            changed[name] = change / norm if norm else 1.0
    return changed


def sayable(changed: Mapping[str, float]) -> None:
    """Raise `InvalidInput`, naming them, if anything has changed that a LoRA cannot say."""
    if changed:
        names = sorted(changed, key=lambda name: -changed[name])
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InvalidInput(
            f"No LoRA can say what it does to {shown}: only weights of linear layers.",
            "Export it as it is, or --to merged; of a merged model, regraft import --rank R leaves these out.",
        )


def _linear_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by the name of their weight, less those whose weight is tied to something else."""
    owners: dict[int, int] = {}
    for _, tensor in model.named_parameters(remove_duplicate=False):
        owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    return {
        f"{name}.weight": layer for name, layer in linear_modules(model).items() if owners.get(id(layer.weight)) == 1
    }
