"""That a merged model, as it lies on the disk, is the base with the adapter folded in, and nothing else.

What people have met instead: the bare base, since another base was given; weights of twice the size; a head that lost
its tie; an update that 16-bit weights round away. Each of these fails here.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from infra.errors import NotMergeable
from training.interchange.probes import Difference, Probe, answers, difference
from training.interchange.weight_changes import base_tensors, parameters_of
from training.methods.contract import Adapted
from training.methods.peft_method import bare

# max |Δ logit| that is allowed, in parts of max |logit|: a few hundred roundings of the written dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class MergeProof:
    """What was seen of a merged model on the disk.

    Attributes:
        changed: tensors that are not the base's.
        untouched: layers with an adapter whose weights are the base's, since its update of them is zero.
        difference: merged against unmerged logits; None where the model cannot be probed.
        dtype: of the written weights.
        size_bytes: of the written weights.
        base_bytes: of the base's in the same dtype.
    """

    changed: int
    untouched: tuple[str, ...]
    difference: Difference | None
    dtype: str
    size_bytes: int
    base_bytes: int


def prove(
    adapted: Adapted, merged: nn.Module, moved: Set[str], written: Path, inputs: Sequence[Probe] | None
) -> MergeProof:
    """Compare a merged model, loaded from where it was written, with the adapter on its base.

    Args:
        adapted: in force, as it was before merging.
        merged: loaded anew, in the dtype in which it was written; afterwards in that of `adapted`.
        moved: the tensors that merging changed, before they were rounded to the dtype in which they are written.
        written: the folder of its weights; its config names that dtype.
        inputs: probes; None where the model cannot be probed.

    Raises:
        NotMergeable: a tensor has another dtype or is missing, an update got lost, the logits differ, or the files hold
            more than the tensors.
    """
    config: Any = merged.config
    dtype: torch.dtype = config.dtype
    before, after = base_tensors(adapted), parameters_of(merged)
    _check_names(adapted, before, after, dtype)
    changed = {name for name, old in before.items() if not torch.equal(old.cpu().to(dtype), after[name].cpu())}
    if lost := sorted(moved - changed):
        raise _failed(adapted, f"{dtype} rounds all of its update of {lost[0]} away{_more(lost)}")
    if strange := sorted(changed - moved):
        raise _failed(adapted, f"{strange[0]} is not the base's, and the adapter does not change it{_more(strange)}")
    untouched = tuple(place for place in _adapted_places(adapted) if not any(_within(name, place) for name in moved))
    size = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    held, base = _bytes(after), _bytes(before, dtype)
    if size > 1.02 * held + (1 << 20):  # headers take little
        raise _failed(adapted, f"its files take {size:,} bytes, its tensors {held:,}")
    compared = None if inputs is None else _compare(adapted, merged, inputs, dtype)
    return MergeProof(len(changed), untouched, compared, str(dtype).removeprefix("torch."), size, base)


def _check_names(
    adapted: Adapted, before: Mapping[str, Tensor], after: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    if missing := sorted(before.keys() - after.keys()):
        raise _failed(adapted, f"it lacks {missing[0]}")
    for name, tensor in after.items():
        if name in before and tensor.shape != before[name].shape:
            raise _failed(adapted, f"{name} is {tuple(tensor.shape)}, not {tuple(before[name].shape)}")
        if tensor.is_floating_point() and tensor.dtype != dtype:
            raise _failed(adapted, f"{name} is {tensor.dtype}, not {dtype}")


def _compare(adapted: Adapted, merged: nn.Module, inputs: Sequence[Probe], dtype: torch.dtype) -> Difference:
    unmerged = answers(adapted.model, inputs)
    with adapted.disabled():
        base = answers(adapted.model, inputs)
    computed = next(adapted.model.parameters()).dtype
    merged.to(computed)  # so that what differs is the rounding of the weights, not that of every product
    found, effect = difference(unmerged, answers(merged, inputs)), difference(unmerged, base)
    allowed = max(TOLERANCE[dtype], TOLERANCE[computed]) * max(1.0, found.range)
    if not found.largest <= allowed:  # NaN fails too
        raise _failed(
            adapted, f"its logits differ from the unmerged ones by {found.largest:.3g}, {allowed:.3g} are allowed"
        )
    if effect.largest > allowed and found.largest > effect.largest / 2:
        raise _failed(
            adapted,
            f"most of the update was lost: it moves the logits by {effect.largest:.3g}, and merged they differ by "
            f"{found.largest:.3g}",
        )
    return found


def _adapted_places(adapted: Adapted) -> list[str]:
    """The layers of the base that the adapter is on."""
    layers = {n: module for n, module in bare(adapted.model).named_modules() if isinstance(module, BaseTunerLayer)}
    return [name for name, layer in layers.items() if adapted.name in getattr(layer, "slots", (adapted.name,))]


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _within(tensor: str, place: str) -> bool:
    return tensor == place or tensor.startswith(f"{place}.")


def _bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Of distinct tensors, tied ones once."""
    distinct = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors.values()}
    return sum(
        t.numel() * (dtype.itemsize if dtype and t.is_floating_point() else t.element_size()) for t in distinct.values()
    )


def _failed(adapted: Adapted, why: str) -> NotMergeable:
    return NotMergeable(
        f"Adapter '{adapted.name}' was merged, and the proof failed: {why}. Nothing was written.",
        "Export it with --dtype float32, or as it is.",
    )
