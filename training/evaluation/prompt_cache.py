"""Prompts read into a KV cache, in batches; what all of them begin with is read once."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from infra.errors import InvalidInput

Ids = Sequence[int]


@dataclass
class Reading:
    """A batch of rows that a model has read so far.

    Attributes:
        body: the module that continues from a cache.
        cache: keys and values of S slots for each of B rows.
        mask: [B, S], 1 where a slot holds a token of the row, 0 where it is padding.
        positions: [B], the position of each row's next token.
        logits: [B, V], after each row's last token.
    """

    body: nn.Module
    cache: DynamicCache
    mask: Tensor
    positions: Tensor
    logits: Tensor

    def step(self, tokens: Tensor) -> Tensor:
        """Read [B, T] further tokens of every row; their logits [B, T, V]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], dim=1)
        positions = self.positions[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.body(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.positions = self.positions + tokens.shape[1]
        self.logits = logits[:, -1]
        return logits

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone; a row that is named twice goes on twice."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions, self.logits = self.mask[rows], self.positions[rows], self.logits[rows]


class PromptCache:
    """Reads prompts for what follows them (greedy decoding, scoring of continuations).

    The longest common prefix of all prompts (system message, few-shot turns) goes through the model once; each batch
    starts from a copy of its keys and values. In a row, slots are [prefix | padding | rest], with positions that do not
    count the padding. With prompt and prefix tuning (PEFT) the virtual tokens belong to the prefix.

    Where layers attend to a sliding window, the padding between prefix and rest would push the prefix out of sight; the
    prefix is shared only where the longest row fits into the window.

    Attributes:
        usable: False where the model keeps no plain KV cache (state-space layers, encoder-decoders), or where its rows
            may not be padded; callers then go without.
        shared: number of prompt tokens that are read once.

    Args:
        model: a causal language model, or a PEFT model around one, in evaluation mode.
        prompts: all prompts that will be read, as token ids.
        room: the most tokens that will follow a prompt.

    Raises:
        InvalidInput: an empty prompt, or one that with `room` is longer than the model can read.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Ids], room: int) -> None:
        self.shared = 0
        self._model = model
        self._prefix: DynamicCache | None = None
        self._virtual = _virtual_tokens(model)
        self._body = model.get_base_model() if self._virtual else model  # type: ignore[operator]
        self.usable = _takes_cache(model)
        longest = max(map(len, prompts)) + self._virtual + room
        _check_lengths(model, prompts, longest)
        if not self.usable:
            return
        common = _common_prefix(prompts)
        cache = self._read_prefix(prompts[0][: max(common, 1)])  # at least one token: what kind of cache is it?
        if not isinstance(cache, DynamicCache) or any(
            type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        ):
            self.usable = False
            return
        windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        if common and longest <= min(windows, default=longest):
            self.shared, self._prefix = common, cache
        elif self._virtual:  # virtual tokens come first, so they cannot come after padding
            self.usable = False

    def read(self, prompts: Sequence[Ids]) -> Reading:
        """Read B of the prompts to their ends."""
        device = next(self._model.parameters()).device
        before = self._virtual + self.shared if self._prefix is not None else 0
        rests = [prompt[self.shared :] for prompt in prompts]
        width = max(map(len, rests))
        tokens = torch.tensor([[0] * (width - len(rest)) + list(rest) for rest in rests], device=device)
        real = torch.tensor([[0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=device)
        mask = torch.cat([real.new_ones(len(rests), before), real], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, before:]
        outputs = self._body(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._prefix_for(len(prompts)),
            use_cache=True,
            **_head_at_last(self._body),
        )
        return Reading(self._body, outputs.past_key_values, mask, positions[:, -1] + 1, outputs.logits[:, -1])

    def _read_prefix(self, tokens: Ids) -> Any:
        device = next(self._model.parameters()).device
        ids = torch.tensor([list(tokens)], device=device)
        return self._model(input_ids=ids, use_cache=True, **_head_at_last(self._body)).past_key_values

    def _prefix_for(self, rows: int) -> DynamicCache | None:
        if self._prefix is None:
            return None
        # These layers never write in place, so shallow copies keep the original as it is.
        cache = copy.copy(self._prefix)
        cache.layers = [copy.copy(layer) for layer in self._prefix.layers]
        cache.batch_repeat_interleave(rows)
        return cache


@contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's own mode is restored afterwards."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True


def in_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of `lengths`, longest first, in batches whose rows × longest row stay within `batch_tokens`."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while order:
        rows = max(1, batch_tokens // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]


def plain_model(model: nn.Module) -> Any:
    """The transformers model under a PEFT model, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


def _virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens a PEFT prompt-learning adapter, where one is in force, puts in front."""
    config = None if getattr(model, "_adapters_disabled", False) else getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def _takes_cache(model: nn.Module) -> bool:
    plain = plain_model(model)
    if plain.config.is_encoder_decoder:
        return False
    return {"past_key_values", "position_ids"} <= inspect.signature(plain.forward).parameters.keys()


def _head_at_last(model: nn.Module) -> dict[str, int]:
    """Apply the output head at the last position only, where the model can do that."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(plain_model(model).forward).parameters else {}


def _common_prefix(prompts: Sequence[Ids]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def _check_lengths(model: nn.Module, prompts: Sequence[Ids], longest: int) -> None:
    if not all(prompts):
        raise InvalidInput("A prompt is empty once tokenised, so a model has nothing to continue.", "Remove the item.")
    limit = getattr(plain_model(model).config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise InvalidInput(
            f"The longest prompt needs {longest:,} tokens with its answer; the model reads at most {limit:,}.",
            "Allow shorter answers (max_new_tokens), use fewer shots, or leave long items out.",
        )
