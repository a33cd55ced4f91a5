"""What prompt tuning, prefix tuning and CPT share: peft keeps their tensors beside the base, not in its layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BasePromptEncoder
from torch import Tensor, nn
from transformers.utils import ModelOutput

from infra.errors import InvalidInput
from training.methods.contract import Adapted, Config
from training.methods.peft_method import PeftAdapted, PeftMethod

CACHED = ("PREFIX_TUNING",)


class SoftPromptAdapted(PeftAdapted):
    """A prompt or prefix on a `PeftModel`; it has no weights to merge into."""

    @property
    def encoder(self) -> BasePromptEncoder:
        """peft's module that holds the adapter's parameters."""
        return self.model.prompt_encoder[self.name]

    def activate(self) -> None:
        """Put this adapter in force; peft itself leaves every prompt's gradient on."""
        super().activate()
        for name, encoder in self.model.prompt_encoder.items():
            encoder.requires_grad_(name == self.name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, the wrapper's `forward` and `generate` are the base's own.

        peft's `disable_adapter` fails on encoders and still prompts an encoder-decoder's `generate`.
        """
        model, base = self.model, self.model.get_base_model()
        names = [name for name in ("forward", "generate") if hasattr(base, name) and name not in vars(model)]
        was_disabled, model._adapters_disabled = model._adapters_disabled, True
        for name in names:
            setattr(model, name, getattr(base, name))
        try:
            yield
        finally:
            for name in names:
                delattr(model, name)
            model._adapters_disabled = was_disabled

    def merge(self) -> nn.Module:
        """A prompt is an input, not a change of weights.

        Raises:
            NotMergeable: always.
        """
        return Adapted.merge(self)


class SoftPromptMethod(PeftMethod[Config]):
    """A method whose adapter is a sequence of virtual tokens."""

    adapted_type = SoftPromptAdapted

    def is_active(self, adapted: PeftAdapted) -> bool:
        """peft's encoder of the prompt is there."""
        return isinstance(adapted, SoftPromptAdapted) and adapted.name in adapted.model.prompt_encoder

    def prepare(self, model: PeftModel) -> None:
        """Keep the promise that outputs have the base's shapes, and that nothing is dropped in silence."""
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        model.register_forward_hook(_after_forward, with_kwargs=True)


def task_type(model: nn.Module) -> TaskType:
    """Which of peft's wrappers knows how to put virtual tokens before this model's inputs.

    Raises:
        InvalidInput: the model reads no tokens.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        raise InvalidInput(f"{type(model).__name__} reads no tokens, so it cannot be prompted.", "Try: lora, ia3")
    if getattr(model.config, "is_encoder_decoder", False):
        return TaskType.SEQ_2_SEQ_LM
    return TaskType.CAUSAL_LM if model.can_generate() else TaskType.FEATURE_EXTRACTION  # type: ignore[operator]


def check_positions(model: nn.Module, virtual_tokens: int) -> None:
    """Raise `InvalidInput` where a prompt would leave no room in the model's positions."""
    config: Any = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and virtual_tokens >= most:
        raise InvalidInput(
            f"virtual_tokens {virtual_tokens} leaves no room in the {most} positions of {type(model).__name__}.",
            "Lower method.virtual_tokens: inputs and answers need positions, too.",
        )


def _before_forward(model: PeftModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if model._adapters_disabled:
        return None
    base, config = model.get_base_model(), model.active_peft_config
    if config.peft_type.value in CACHED:
        if base.training and base.is_activation_checkpointing:
            raise InvalidInput(
                "A prefix lives in the key-value cache, which gradient checkpointing switches off.",
                "Set gradient_checkpointing: false, or use prompt-tuning.",
            )
        return None
    if kwargs.get("position_ids") is not None:
        raise InvalidInput(
            "A prompt cannot take position ids: it would stand before the first packed example only.",
            "Set packing: false.",
        )
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, Tensor):
        kwargs = kwargs | {"logits_to_keep": keep + config.num_virtual_tokens}
    return args, kwargs


def _after_forward(model: PeftModel, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
    """Cut the prompt's own positions off the outputs of models that read it as part of their sequence."""
    config = model.active_peft_config
    if model._adapters_disabled or config.peft_type.value in CACHED or config.task_type == TaskType.SEQ_2_SEQ_LM:
        return outputs
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    rows, added = inputs.shape[0], config.num_virtual_tokens
    prompted = (rows, inputs.shape[1] + added)

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(inner) for inner in value)
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == prompted:
            return value[:, added:]
        return value

    if isinstance(outputs, ModelOutput):
        return type(outputs)(**{name: cut(value) for name, value in outputs.items()})
    return cut(outputs)
