"""Base models, adapters, versions, aliases, evaluations, promotions, lineage, artifacts. Imports infra; never torch.

`from registry import AdapterRegistry` is the way in. It brings SQLAlchemy; MLflow and boto3 come when they are needed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry.registry import AdapterRegistry

__all__ = ["AdapterRegistry"]


def __getattr__(name: str) -> object:
    if name == "AdapterRegistry":
        from registry.registry import AdapterRegistry

        return AdapterRegistry
    raise AttributeError(f"module 'registry' has no attribute {name!r}")
