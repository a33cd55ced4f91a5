"""A GPU slot: as many flow runs as the setting `gpu_slots` says hold a GPU at a time; the others wait.

A slot is a Prefect global concurrency limit, taken under a lease: a run that is killed gives its slot back when the
lease runs out, which a tag-based limit would keep for ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency

from infra.settings import get_settings

SLOT = "regraft-gpu"
_LEASE_SECONDS = 60  # renewed while the holder lives


@contextmanager
def gpu_slot(device: torch.device | str) -> Iterator[None]:
    """Hold a GPU slot while work runs on a CUDA `device`; nothing to wait for on any other."""
    if torch.device(device).type != "cuda":
        yield
        return
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(SLOT, get_settings().gpu_slots)
    with concurrency(SLOT, lease_duration=_LEASE_SECONDS, strict=True):
        yield
