"""What strangers' adapter_config.json files say is looked at before peft, which trusts them, reads them."""

import json
from math import sqrt
from pathlib import Path
from typing import Any

import peft
import pytest

from infra.errors import CorruptArtifact, InvalidInput
from training.methods.foreign_config import ForeignLora

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("r", "8", "r"),
        ("r", 8.0, "r"),
        ("r", True, "r"),
        ("r", 0, "r"),
        ("r", -8, "r"),
        ("r", None, "r"),
        ("lora_alpha", "16", "lora_alpha"),
        ("lora_alpha", None, "lora_alpha"),
        ("lora_alpha", [1], "lora_alpha"),
        ("lora_alpha", True, "lora_alpha"),
        ("lora_alpha", float("inf"), "lora_alpha"),
        ("lora_dropout", 5, "lora_dropout"),
        ("rank_pattern", [1], "rank_pattern"),
        ("rank_pattern", {"q_proj": "x"}, r"rank_pattern\.q_proj"),
        ("alpha_pattern", {"q_proj": None}, r"alpha_pattern\.q_proj"),
        ("target_modules", 5, "target_modules"),
        ("layers_to_transform", "x", "layers_to_transform"),
        ("modules_to_save", "x", "modules_to_save"),
        ("runtime_config", 3, "runtime_config"),
        ("use_rslora", "x", "use_rslora"),
        ("base_model_name_or_path", 5, "base_model_name_or_path"),
        ("peft_type", 5, "peft_type"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(key: str, value: Any, named: str) -> None:
    content = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, key: value}
    with pytest.raises(InvalidInput, match=rf"^adapter_config\.json: {named}: "):
        ForeignLora.read(content)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"use_dora": True},
    ],
)
def test_what_peft_writes_is_taken(tmp_path: Path, options: dict[str, Any]) -> None:
    peft.LoraConfig(r=4, lora_alpha=6, **options).save_pretrained(str(tmp_path))
    assert ForeignLora.read(json.loads((tmp_path / "adapter_config.json").read_text())).scale(Q) == 1.5


def test_patterns_decide_rank_and_scale_of_a_layer() -> None:
    said = ForeignLora.read(
        {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {V: 3.0}}
    )
    assert (said.rank(Q), said.rank(V), said.scale(Q), said.scale(V)) == (8, 2, 2.0, 1.5)
    assert said.model_copy(update={"use_rslora": True}).scale(V) == 3 / sqrt(2)
    said.require_rank(V, 2)
    with pytest.raises(CorruptArtifact, match="is stored at rank 8; the config says 2"):
        said.require_rank(V, 8)
