import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from infra.settings import Settings
from registry import AdapterRegistry

BASE = "a" * 64
OTHER_BASE = "b" * 64


@pytest.fixture(scope="session")
def fresh_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with empty databases; MLflow needs seconds to make its own, so tests copy this one."""
    home = tmp_path_factory.mktemp("fresh")
    registry = AdapterRegistry(Settings(home=home))
    registry.base_models()
    registry.tracking.aliases("nobody")
    return home


@pytest.fixture
def settings(fresh_home: Path, tmp_path: Path) -> Settings:
    home = tmp_path / "home"
    shutil.copytree(fresh_home, home)
    return Settings(home=home)


@pytest.fixture
def registry(settings: Settings) -> AdapterRegistry:
    registry = AdapterRegistry(settings)
    registry.register_base_model("wheel:tiny/a.gguf", BASE, name="tiny-a", family="llama", parameters=1000)
    registry.register_base_model("wheel:tiny/b.gguf", OTHER_BASE, name="tiny-b", family="gemma", parameters=2000)
    return registry


@pytest.fixture
def adapter_directory(tmp_path: Path) -> Callable[..., Path]:
    """Makes adapter directories in PEFT's layout; different seeds give different tensors."""

    def make(
        seed: int = 0, base: str | None = None, details: dict[str, object] | None = None, **config: object
    ) -> Path:
        directory = tmp_path / f"adapter-{seed}-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        generator = np.random.default_rng(seed)
        tensors = {
            "base_model.model.q.lora_A.weight": generator.normal(size=(2, 8)).astype(np.float32),
            "base_model.model.q.lora_B.weight": generator.normal(size=(8, 2)).astype(np.float32),
        }
        save_file(tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **config}))
        if base is not None or details:
            (directory / "regraft.json").write_text(
                json.dumps({"base": {"reference": "x", "identity": base}, **(details or {})})
            )
        return directory

    return make


@pytest.fixture
def register(registry: AdapterRegistry, adapter_directory: Callable[..., Path]) -> Callable[..., str]:
    """Registers the next version of an adapter; returns its address."""
    seeds = iter(range(1000))

    def make(adapter: str = "counting", registry: AdapterRegistry = registry, **changes: object) -> str:
        said = {"base_identity": BASE, "method": "lora", "recipe": {"seed": 1}, "trainable_parameters": 32, **changes}
        return registry.register_version(adapter, adapter_directory(next(seeds)), **said).address

    return make


@pytest.fixture
def evaluate(registry: AdapterRegistry) -> Callable[..., int]:
    """Records an evaluation with the given 0/1 outcomes; returns its id."""

    def make(address: str, outcomes: list[int], suite: str = "counting", fingerprint: str | None = "t" * 64) -> int:
        return registry.record_evaluation(
            address,
            suite,
            "accuracy",
            sum(outcomes) / len(outcomes),
            samples=len(outcomes),
            outcomes=outcomes,
            dataset_fingerprint=fingerprint,
        ).id

    return make
