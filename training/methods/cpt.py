"""CPT: a prompt that starts as labelled examples and stays within a small ball (Blau et al., arXiv 2410.17222).

    [E₀ + D; X] instead of X,    ‖D_i‖ ≤ ε_i·√(d/2048),    D ∈ ℝ^{p×d} trained from zero

E₀ are the embeddings of demonstrations, so a fresh adapter is in-context learning with them. Each of their tokens has a
type: 1 input template, 2 input, 3 output template, 4 label, of demonstration e plus 4e, or 0 between demonstrations.
Inputs move within `epsilon`, templates within `format_epsilon`, labels and separators not at all. The loss adds the
demonstrations' own labels, `decay` times less with each one further back.

The demonstrations are `demonstrations`, or the first of the training examples, whose prompt then counts as input and
whose labelled tokens as label. Exactly p tokens are taken, the last ones of what is there: where the first
demonstration is cut, it is cut at its start.

Where peft and this differ, on peft's layers: peft averages one loss over the context's and the example's labels
together, for which its forward pass must be given labels, and an adapter called "default"; here the example's is the
objective's, as for every method, and the context's, which depends on nothing that comes after it, is a term of its own,
times `context_weight`. D is stored beside E₀ + D, so that the ball keeps its centre when a training goes on; peft reads
the sum. The stored configuration holds the demonstrations' tokens: they can be read back.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, TaskType
from peft.tuners.cpt.model import CPTEmbedding
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from infra.documents import Section
from infra.errors import CorruptArtifact, InvalidInput
from kernels.cross_entropy import IGNORE
from training.methods.contract import AttachContext, Batch, MethodCard, MethodConfig, check_fit
from training.methods.peft_method import PeftAdapted
from training.methods.soft_prompt import SoftPromptAdapted, SoftPromptMethod, check_positions, task_type

PROMPT, DELTA = "prompt_embeddings", "prompt_embeddings.delta"
SEPARATOR, INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE, LABEL = range(5)
Typed = tuple[list[int], list[int]]  # token ids, their types


class Demonstration(Section):
    """One labelled example of the context."""

    input: str
    output: str = Field(min_length=1)


class CptConfig(MethodConfig):
    """Hyper-parameters of CPT."""

    virtual_tokens: int = Field(128, ge=2, description="p, how many tokens of demonstrations there are.")
    epsilon: float = Field(0.2, gt=0, description="How far an input's embedding may move, for a width of 2048.")
    format_epsilon: float = Field(0.1, gt=0, description="How far a template's embedding may move.")
    decay: float = Field(0.95, gt=0, le=1, description="Weight of a demonstration's label, beside the one after it.")
    context_weight: float = Field(1.0, ge=0, description="Weight of the loss on the demonstrations' own labels.")
    demonstrations: tuple[Demonstration, ...] = Field(
        (), description="Pairs of input and output; none given: the first of the training examples."
    )
    input_template: str = Field("input: ", description="Before the input of each of `demonstrations`.")
    output_template: str = Field(" output: ", description="Before its output.")
    separator: str = Field("\n", description="After its output.")


class Context(CPTEmbedding):
    """peft's E₀ and D, with a projection that leaves alone what it has projected.

    peft's scales a row again and again where rounding leaves its norm an ulp above ε: every forward pass, in evaluation
    too, would change the adapter.
    """

    def get_projection(self) -> Tensor:
        """D [p, d], each row within its ball, to one part in a million."""
        delta: Tensor = self.delta_embedding.weight.detach()
        norm, most = delta.norm(dim=1, keepdim=True), self.get_epsilon().to(delta.device)[:, None]
        return torch.where(norm > most * (1 + 1e-6), delta * (most / norm), delta)


class CptAdapted(SoftPromptAdapted):
    """A context on a `PeftModel`."""

    context_weight = 1.0

    def activate(self) -> None:
        """Put this adapter in force; D trains, E₀ does not."""
        super().activate()
        self.encoder.embedding.requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """E₀ + D, with D within its ball, as peft stores it, and D as it is."""
        encoder: Any = self.encoder
        delta = encoder.delta_embedding.weight.detach()
        return {PROMPT: encoder.embedding.weight.detach().float() + encoder.get_projection(), DELTA: delta}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put D in place; E₀ is the base's own."""
        check_fit(self.name, self.tensors(), tensors)
        encoder: Any = self.encoder
        with torch.no_grad():
            encoder.delta_embedding.weight.copy_(tensors[DELTA])

    def extra_loss(self, outputs: Any, batch: Batch) -> Tensor | None:
        """The weighted mean loss of the demonstrations' own labels."""
        del outputs, batch
        config: Any = self.peft_config
        types = torch.tensor(config.cpt_tokens_type_mask)
        places = ((types > 0) & (types % LABEL == 0)).nonzero()[:, 0]
        places = places[places > 0]  # nothing predicts the first token
        if not self.context_weight or not len(places):
            return None
        encoder: Any = self.encoder
        base: Any = self.model.get_base_model()
        prompt = encoder(torch.arange(len(types), device=encoder.embedding.weight.device))
        logits = base(inputs_embeds=prompt[None].to(base.get_input_embeddings().weight.dtype)).logits[0]
        labels = torch.tensor(config.cpt_token_ids, device=logits.device)[places.to(logits.device)]
        losses = cross_entropy(logits[places.to(logits.device) - 1].float(), labels, reduction="none")
        behind = (types.max() - types[places]) // LABEL + 1  # 1 for the last demonstration; the example itself is 0
        weighted: Tensor = losses * config.opt_loss_decay_factor ** behind.to(losses)
        return self.context_weight * weighted.mean()


class Cpt(SoftPromptMethod[CptConfig]):
    """CPT."""

    name = "cpt"
    peft_type = "CPT"
    config_type = CptConfig
    adapted_type = CptAdapted
    card = MethodCard(
        title="Labelled examples as a prompt whose embeddings move a little",
        family="additive / soft prompt",
        paper="Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods, arXiv 2410.17222",
        parameters="p · d, those of labels and separators held at zero",
        backbones=("llama", "gpt2", "gemma3_text"),
        merge="no",
        identity_at_init=False,
        needs_calibration="optional",
        packing=False,
        sharding=False,
    )

    def configure(self, model: nn.Module, config: CptConfig, context: AttachContext) -> PeftConfig:
        """`peft.CPTConfig` with the context's tokens and their types.

        Raises:
            InvalidInput: the model is no causal language model, or there are too few demonstrations or positions.
        """
        if task_type(model) != TaskType.CAUSAL_LM:
            raise InvalidInput(f"cpt needs a causal language model, which {type(model).__name__} is not.", "Try: lora")
        check_positions(model, config.virtual_tokens)
        ids, types = _context(config, context)
        return peft.CPTConfig(
            task_type=TaskType.CAUSAL_LM,
            cpt_token_ids=ids,
            cpt_tokens_type_mask=types,
            cpt_mask=[1] * len(ids),
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=config.decay,
            opt_projection_epsilon=config.epsilon,
            opt_projection_format_epsilon=config.format_epsilon,
        )

    def peft_config(self, model: nn.Module, config: CptConfig) -> PeftConfig:
        """`configure` where nothing but the options is known."""
        return self.configure(model, config, AttachContext())

    def initialise(self, adapted: PeftAdapted, config: CptConfig, context: AttachContext) -> None:
        """Nothing moves yet; the weight of the context's loss is the training's, not the adapter's."""
        del context
        assert isinstance(adapted, CptAdapted)
        adapted.context_weight = config.context_weight

    def prepare(self, model: PeftModel) -> None:
        """Keep labels from peft's own loss: the model's is the base's, on what comes after the context."""
        model.register_forward_pre_hook(_take_labels, with_kwargs=True)
        super().prepare(model)
        model.register_forward_hook(_give_loss)

    def completed(self, adapted: PeftAdapted, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """peft stores E₀ + D alone."""
        encoder: Any = adapted.encoder  # type: ignore[attr-defined]
        start = encoder.embedding.weight.detach()
        if DELTA in tensors or tensors.keys() != {PROMPT} or tensors[PROMPT].shape != start.shape:
            return tensors
        delta = tensors[PROMPT].to(start.device).float() - start.float()
        if (delta.norm(dim=1) > encoder.get_epsilon().to(start.device) * 1.01 + 1e-5).any():
            raise CorruptArtifact("The prompt is not made of this base's embeddings.", "Was it trained on this base?")
        return tensors | {DELTA: delta}

    def count(self, model: nn.Module, config: CptConfig) -> int:
        """p · d."""
        return config.virtual_tokens * int(model.get_input_embeddings().embedding_dim)  # type: ignore[operator]

    def _put(self, model: nn.Module, peft_config: PeftConfig, name: str) -> PeftAdapted:
        adapted = super()._put(model, peft_config, name)
        encoder: Any = adapted.encoder  # type: ignore[attr-defined]
        encoder.__class__ = Context
        encoder.embedding.to(adapted.model.word_embeddings.weight.dtype)  # exact: it was taken from there
        return adapted


def _context(config: CptConfig, context: AttachContext) -> Typed:
    """The last `virtual_tokens` tokens of the demonstrations, and their types."""
    ids: list[int] = []
    types: list[int] = []
    for number, (tokens, kinds) in enumerate(_demonstrations(config, context)):
        ids += tokens
        types += [kind + LABEL * number if kind else SEPARATOR for kind in kinds]
        if not config.demonstrations and len(ids) >= config.virtual_tokens:
            break
    if len(ids) < config.virtual_tokens:
        raise InvalidInput(
            f"The demonstrations have {len(ids)} tokens, and virtual_tokens is {config.virtual_tokens}.",
            f"Lower method.virtual_tokens to {len(ids)}, or give more of them.",
        )
    ids, types = ids[-config.virtual_tokens :], types[-config.virtual_tokens :]
    cut = min((kind - 1) // LABEL for kind in types if kind)  # whole demonstrations that fell out
    types = [kind and kind - LABEL * cut for kind in types]
    if not any(kind % LABEL for kind in types):
        raise InvalidInput(
            "Every token of the demonstrations is a label, so none may move.", "Set training.loss_on: completion."
        )
    return ids, types


def _demonstrations(config: CptConfig, context: AttachContext) -> Iterator[Typed]:
    if config.demonstrations:
        if context.processor is None:
            raise InvalidInput(
                "cpt with demonstrations needs the base model's tokenizer, and it has none.",
                "Leave method.demonstrations out: the first training examples serve.",
            )
        for shown in config.demonstrations:
            parts = (config.input_template, shown.input, config.output_template, shown.output, config.separator)
            kinds = (INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE, LABEL, SEPARATOR)
            tokens = [context.processor(part, add_special_tokens=False)["input_ids"] if part else [] for part in parts]
            yield (
                [token for part in tokens for token in part],
                [kind for kind, part in zip(kinds, tokens, strict=True) for _ in part],
            )
    elif context.calibration is None:
        raise InvalidInput("cpt needs calibration data or demonstrations.", "Set method.demonstrations.")
    else:
        for batch in context.calibration():
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            for ids, seen, labels in zip(batch["input_ids"], mask.bool(), batch["labels"], strict=True):
                yield ids[seen].tolist(), torch.where(labels[seen] == IGNORE, INPUT, LABEL).tolist()


def _take_labels(model: PeftModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if model._adapters_disabled:
        return None
    model._labels = kwargs.get("labels")
    return args, kwargs | {"labels": None}


def _give_loss(model: PeftModel, args: tuple[Any, ...], outputs: Any) -> None:
    del args
    labels = vars(model).pop("_labels", None)
    if labels is not None:
        base: Any = model.get_base_model()
        outputs.loss = base.loss_function(outputs.logits.contiguous(), labels, vocab_size=base.config.vocab_size)


METHOD = Cpt()
