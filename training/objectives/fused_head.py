"""The loss of a model whose output head is asked for losses, not for logits.

While the model runs, its head, an ordinary linear layer, computes `kernels.linear_cross_entropy` of what it is given
and answers with logits of no position. What architectures do to their logits afterwards (scale, cap) is known by its
name in their configurations, and put to the test when a model is first seen: its head answers with made-up logits of
one position, and must find what became of them among its outputs. Any other model keeps its logits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kernels.linear_cross_entropy import Head, SoftTargets, linear_cross_entropy

_PROBED = 20.0  # made-up logits go so far from 0
_ROUNDING = 1e-5  # of them, in float32


class Fused(NamedTuple):
    """What a model makes of a batch without logits.

    Args:
        losses: [N].
        outputs: what the model returned, with logits [1, 0, V].
    """

    losses: Tensor
    outputs: Any


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, where the model says which."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if find else None


def fused_losses(
    model: nn.Module, bare: nn.Module, inputs: Mapping[str, Any], targets: Tensor, soft: SoftTargets | None
) -> Fused | None:
    """The losses of what the head is given, or None where it or what comes after it is not of the known kind.

    Args:
        model: called with `inputs`.
        bare: the same without its data-parallel wrapper; something has been put in front of its head, so that it is
            given hidden states [1, N, H].
        inputs: everything the model reads, without labels.
        targets: [N].
        soft: what a teacher says of the same positions.
    """
    head = output_head(bare)
    if head is None or not _is_plain(head):
        return None
    scale, cap = _after(bare)
    kind = (scale, cap, tuple(bare._forward_hooks))
    known = _seen.get(bare)
    if known == (kind, False):
        return None
    probes = known != (kind, True)
    state = _random_state(targets.device) if probes else None
    losses: list[Tensor] = []

    def judge(hidden: Tensor) -> Tensor:
        found = linear_cross_entropy(hidden[0], Head(head.weight, head.bias, scale, cap), targets, soft)  # type: ignore[arg-type]
        losses.append(found)
        # Part of the graph, so that whoever watches a model's outputs (DDP, FSDP) sees what the loss depends on.
        none = found[None, :0, None].expand(1, 0, len(head.weight))  # type: ignore[arg-type]
        return torch.cat([_made_up(none), none], dim=1) if probes else none

    with _answering(head, judge):
        outputs = model(**inputs)
    if probes:
        agree = len(losses) == 1 and _became(outputs.logits, len(head.weight), scale, cap)  # type: ignore[arg-type]
        _seen[bare] = (kind, agree)
        if not agree:
            _restore(state, targets.device)
            return None
        outputs.logits = outputs.logits[:, 1:]
    (found,) = losses
    return Fused(found + outputs.logits.sum(), outputs)  # of none: 0


_seen: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], bool]] = WeakKeyDictionary()


def _is_plain(head: nn.Module) -> bool:
    """Whether logits are h·Wᵀ + b, and nobody listens to them (FSDP listens to be told of the backward pass)."""
    listened = bool(head._forward_hooks) and not isinstance(head, FSDPModule)
    return type(head).forward is nn.Linear.forward and "forward" not in vars(head) and not listened


def _after(model: nn.Module) -> tuple[float, float | None]:
    """γ and c of the model's logits, as configurations call them."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1)
    return float(scale), getattr(text, "final_logit_softcapping", None) or None


@contextmanager
def _answering(head: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = answer
    try:
        yield
    finally:
        del head.forward


def _made_up(like: Tensor) -> Tensor:
    """Logits [1, 1, V] from low to high, of the dtype and device of others."""
    return torch.linspace(-_PROBED, _PROBED, like.shape[-1], dtype=like.dtype, device=like.device)[None, None]


def _became(found: Tensor, vocabulary: int, scale: float, cap: float | None) -> bool:
    """Whether that is what made-up logits become by γ and c."""
    if tuple(found.shape) != (1, 1, vocabulary):
        return False
    expected = _made_up(found.double()).mul_(scale)
    if cap is not None:
        expected = cap * (expected / cap).tanh()
    return torch.allclose(found.double(), expected, rtol=_ROUNDING, atol=_ROUNDING)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _restore(state: list[Tensor] | None, device: torch.device) -> None:
    if state is None:
        return
    torch.set_rng_state(state[0])
    for of_gpu in state[1:]:
        torch.cuda.set_rng_state(of_gpu, device)
