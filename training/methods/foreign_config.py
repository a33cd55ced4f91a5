"""What an adapter_config.json in peft's format says, its types checked before peft, which trusts them, reads it."""

import re
from collections.abc import Mapping
from math import sqrt
from typing import Any, Self, TypeVar

from peft.utils.other import get_pattern_key
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from infra.documents import parse
from infra.errors import CorruptArtifact

RESTORE = "Copy it again from where it was made."
Names = list[str] | str | None
Value = TypeVar("Value")


class ForeignConfig(BaseModel):
    """The keys that peft reads for most of its types; what a type has of its own stays unread here."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore", protected_namespaces=())

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names = None
    fan_in_fan_out: bool | None = None
    auto_mapping: dict[str, Any] | None = None

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """From the file's content.

        Raises:
            InvalidInput: names every key with a value of another kind than peft writes.
        """
        return parse(cls, dict(content), "adapter_config.json")


class ForeignLora(ForeignConfig):
    """Those of peft's LORA, with peft's defaults."""

    r: PositiveInt = 8
    lora_alpha: float = 8
    lora_dropout: float | None = Field(None, ge=0, le=1)
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    layer_replication: list[list[int]] | None = None
    target_parameters: list[str] | None = None
    runtime_config: dict[str, Any] | None = None
    loftq_config: dict[str, Any] | None = None
    megatron_config: dict[str, Any] | None = None

    def rank(self, place: str) -> int:
        """r of a layer."""
        return _of(self.rank_pattern, place, self.r)

    def scale(self, place: str) -> float:
        """α/r of a layer, or α/√r with rsLoRA."""
        rank = self.rank(place)
        return _of(self.alpha_pattern, place, self.lora_alpha) / (sqrt(rank) if self.use_rslora else rank)

    def require_rank(self, place: str, stored: int) -> None:
        """Raise `CorruptArtifact` where a layer's factors are of another rank than `rank` says."""
        if self.rank(place) != stored:
            raise CorruptArtifact(f"{place} is stored at rank {stored}; the config says {self.rank(place)}.", RESTORE)


def _of(pattern: Mapping[str, Value] | None, place: str, default: Value) -> Value:
    """What a rank or alpha pattern of peft says of a layer."""
    if not pattern:
        return default
    try:
        return pattern.get(get_pattern_key(list(pattern), place), default)
    except re.error as error:
        raise CorruptArtifact(
            f"A rank or alpha pattern of its adapter_config.json is no pattern ({error}).", RESTORE
        ) from None
