"""Starts of adapters that took long to compute (singular vectors, calibration), kept from one training to the next."""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, contiguous_format


class StartCache:
    """Starts of one base model under one set of calibration data.

    Args:
        directory: where they are kept.
        base_identity: sha256 of the base model.
        data_fingerprint: sha256 of what calibration batches are drawn from.
    """

    def __init__(self, directory: Path, base_identity: str, data_fingerprint: str) -> None:
        self._directory = directory
        self._of = [base_identity, data_fingerprint]

    def get(self, what: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """See `Starts`; a damaged file is made anew."""
        told = json.dumps([*self._of, what], sort_keys=True).encode()
        path = self._directory / f"{hashlib.sha256(told).hexdigest()}.safetensors"
        try:
            kept = _read(path)
        except (OSError, SafetensorError):
            made = make()  # several may be views of one tensor, which the format does not take: hence copies
            kept = {name: t.detach().cpu().clone(memory_format=contiguous_format) for name, t in made.items()}
            self._directory.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{secrets.token_hex(4)}")
            try:
                save_file(kept, draft, metadata={_SUM: _sum(kept)})
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        return kept


_SUM = "sha256"


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if (file.metadata() or {}).get(_SUM) != _sum(kept):
            raise SafetensorError(f"{path} is damaged")
    return kept


def _sum(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(sorted(tensors.items())))).hexdigest()
