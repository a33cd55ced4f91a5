"""Compressed adapters in the PEFT layout: whoever reads a stored adapter gets its config and tensors as they were.

adapter_config.json          {"peft_type": "COMPRESSED", "steps": …, "adapter": what it was}
adapter_model.safetensors    what `compress` made

peft does not know the type and refuses it, where it would find no tensor of any name that it knows and say nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import CorruptArtifact

COMPRESSED = "COMPRESSED"


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is that of a compressed adapter."""
    return config.get("peft_type") == COMPRESSED


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What adapter_config.json would be without the compression.

    Raises:
        CorruptArtifact: it does not say.
    """
    content = config.get("adapter")
    if not isinstance(content, dict):
        raise CorruptArtifact(
            "The adapter_config.json of a compressed adapter does not say what it was before.",
            "Restore the directory from where it was copied.",
        )
    return content


def write_compressed(directory: Path, config: Mapping[str, Any], steps: str, data: bytes) -> None:
    """Write the two files into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_model.safetensors").write_bytes(data)
    content = json.dumps({"peft_type": COMPRESSED, "steps": steps, "adapter": dict(config)}, indent=2, sort_keys=True)
    (directory / "adapter_config.json").write_text(content + "\n", encoding="utf-8")
