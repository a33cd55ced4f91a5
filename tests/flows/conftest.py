"""A local Prefect server and a tiny base model, shared by the flow tests of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.settings import Settings, get_settings
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="session")
def connected(regraft_home: Path) -> Settings:
    """Prefect runs, and flows report to it."""
    from infra.prefect_client import configure_prefect

    settings = get_settings()
    configure_prefect(settings)
    return settings


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Reference of a tiny Llama."""
    return f"path:{save_tiny_llama(tmp_path_factory.mktemp('tiny-llama'))}"


@pytest.fixture
def recipe_content(tiny_base: str) -> Callable[..., dict[str, Any]]:
    """A recipe that trains in a second; keyword arguments replace sections."""

    def content(adapter: str, **sections: Any) -> dict[str, Any]:
        return {
            "adapter": adapter,
            "base": tiny_base,
            "method": {"name": "lora", "rank": 4},
            "data": {"task": "boolean_expressions", "sizes": {"train": 40, "validation": 8, "test": 24}},
            "training": {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "max_length": 512},
            "evaluation": [{"samples": 24, "max_new_tokens": 4}],
            "migration_kit": False,
            **sections,
        }

    return content
