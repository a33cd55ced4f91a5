"""Prompt tuning: trained embeddings before the input (Lester et al., arXiv 2104.08691).

    [P; X] instead of X,    P ∈ ℝ^{p×d} trained, X ∈ ℝ^{n×d} the input's embeddings

100 virtual tokens, started from the embeddings of sampled tokens, are the paper's setting; it samples from the 5,000
most common tokens, here every token counts alike. `random` is the paper's uniform distribution on [−0.5, 0.5] (peft:
standard normal). An encoder-decoder is prompted at its encoder, as in the paper. Position ids cannot be given, so that
packed examples are refused; a sequence classifier that reads its first position reads the prompt's.
"""

import math
from typing import Literal

import peft
import torch
from peft import PeftConfig
from pydantic import Field, model_validator
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.methods.contract import AttachContext, MethodCard, MethodConfig
from training.methods.peft_method import PeftAdapted
from training.methods.soft_prompt import SoftPromptMethod, check_positions, task_type


class PromptTuningConfig(MethodConfig):
    """Hyper-parameters of prompt tuning."""

    virtual_tokens: int = Field(100, ge=1, description="p, the number of trained embeddings.")
    init: Literal["vocab", "random", "text"] = Field(
        "vocab", description="Start from sampled tokens' embeddings, uniform noise, or the embeddings of init_text."
    )
    init_text: str | None = Field(None, min_length=1, description="For init: text; repeated or cut to virtual_tokens.")

    @model_validator(mode="after")
    def _text_where_it_is_used(self) -> "PromptTuningConfig":
        if self.init == "text" and self.init_text is None:
            raise ValueError("init: text needs init_text, the text to start from")
        if self.init != "text" and self.init_text is not None:
            raise ValueError("init_text is only read with init: text")
        return self


class PromptTuning(SoftPromptMethod[PromptTuningConfig]):
    """Prompt tuning."""

    name = "prompt-tuning"
    peft_type = "PROMPT_TUNING"
    config_type = PromptTuningConfig
    card = MethodCard(
        title="Trained embeddings before the input",
        family="additive / soft prompt",
        paper="The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691",
        parameters="p · d",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5"),
        merge="no",
        identity_at_init=False,
        packing=False,
        sharding=False,  # peft looks the prompt's neighbours up outside the model's forward pass
    )

    def peft_config(self, model: nn.Module, config: PromptTuningConfig) -> PeftConfig:
        """`peft.PromptTuningConfig`, for one stack of layers also where the model has two."""
        kind = task_type(model)
        check_positions(model, config.virtual_tokens)
        return peft.PromptTuningConfig(
            task_type=kind, num_virtual_tokens=config.virtual_tokens, num_transformer_submodules=1
        )

    def initialise(self, adapted: PeftAdapted, config: PromptTuningConfig, context: AttachContext) -> None:
        """Start as `config.init` says."""
        generator = context.generator()
        words = adapted.model.word_embeddings
        prompt = adapted.model.prompt_encoder[adapted.name].embedding.weight
        if config.init == "random":
            start = torch.rand(prompt.shape, generator=generator) - 0.5
        elif config.init == "vocab":
            tokens = torch.randint(words.num_embeddings, (config.virtual_tokens,), generator=generator)
            start = words(tokens.to(words.weight.device))
        else:
            start = words(_text_tokens(config, context).to(words.weight.device))
        with torch.no_grad():
            prompt.copy_(start)

    def readable(self, adapter_config: dict[str, object], tensors: dict[str, Tensor]) -> dict[str, object]:
        """Without peft's own start, for which it would fetch a tokenizer."""
        del tensors
        return adapter_config | {"prompt_tuning_init": "RANDOM", "tokenizer_name_or_path": None}

    def count(self, model: nn.Module, config: PromptTuningConfig) -> int:
        """p · d."""
        return config.virtual_tokens * int(model.get_input_embeddings().embedding_dim)  # type: ignore[operator]


def _text_tokens(config: PromptTuningConfig, context: AttachContext) -> Tensor:
    if context.processor is None:
        raise InvalidInput(
            "prompt-tuning with init: text needs the base's tokenizer, and it has none.",
            "Set method.init: vocab.",
        )
    tokens = context.processor(config.init_text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise InvalidInput(f"init_text: {config.init_text!r} has no tokens.", "Give words, or set method.init: vocab.")
    repeated = tokens * math.ceil(config.virtual_tokens / len(tokens))
    return torch.tensor(repeated[: config.virtual_tokens])


METHOD = PromptTuning()
