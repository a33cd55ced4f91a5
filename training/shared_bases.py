"""Base models that stay in memory between the adapters that use them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from training.base_models import LoadedBase, load_base
from training.methods.borrowing import borrowed


class SharedBases:
    """Lends base models, bare, and keeps those that come back. For one thread.

    Args:
        most: base models that are kept while nobody uses them; those used longest ago go first.
    """

    def __init__(self, most: int = 2) -> None:
        self._most = most
        self._kept: dict[tuple[str, torch.dtype, str], LoadedBase] = {}

    @contextmanager
    def lend(
        self, reference: str, *, cache: Path, dtype: torch.dtype, device: torch.device, own: bool = False
    ) -> Iterator[LoadedBase]:
        """A bare base model, to attach to and train on until the end of the block.

        Args:
            reference: as for `load_base`, as are the next three.
            cache: see there.
            dtype: see there.
            device: see there.
            own: its tensors will be written (`MethodCard.changes_base`), so nobody else gets it.
        """
        key = (reference, dtype, str(device))
        base = None if own else self._kept.pop(key, None)
        base = base or load_base(reference, cache=cache, dtype=dtype, device=device)
        try:
            with borrowed(base.model):
                yield base
        finally:
            if not own:
                self._kept[key] = base
                while len(self._kept) > self._most:
                    self._kept.pop(next(iter(self._kept)))


_shared: ContextVar[SharedBases | None] = ContextVar("shared_bases", default=None)


@contextmanager
def shared_bases() -> Iterator[SharedBases]:
    """Within the outermost of these blocks, all who ask get the same base models."""
    if (bases := _shared.get()) is not None:
        yield bases
        return
    bases = SharedBases()
    token = _shared.set(bases)
    try:
        yield bases
    finally:
        _shared.reset(token)
