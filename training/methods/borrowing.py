"""One loaded base for many adapters, one after the other: whatever was attached comes off again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Within it, adapters may be put on a bare `model` and trained; afterwards it is as bare as it was.

    Submodules, hooks, modes and flags are put back, values are not: nobody may write the base's own tensors, so methods
    whose card says `changes_base` need a model of their own. What was attached must not be used afterwards.
    """
    modules = [(module, type(module), _shallow(vars(module))) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = getattr(model, "config", None)
    configured = _shallow(vars(config)) if config is not None else {}
    try:
        yield
    finally:
        for module, kind, state in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        if config is not None:
            vars(config).clear()
            vars(config).update(configured)


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an object, its containers copied."""
    return {name: value.copy() if isinstance(value, dict | list | set) else value for name, value in state.items()}
