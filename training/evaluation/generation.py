"""Greedy answers, in length-sorted batches over a KV cache; equal to generating them one by one."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from training.data.prompting import PromptFormat
from training.evaluation.prompt_cache import Ids, PromptCache, in_batches, judging, plain_model


def end_tokens(model: nn.Module, tokenizer: Any, form: PromptFormat | None = None) -> set[int]:
    """Everything that ends an answer: the tokenizer's and the model's end of text, and the format's end mark."""
    of_model = getattr(getattr(plain_model(model), "generation_config", None), "eos_token_id", None)
    of_mark = tokenizer(form.end_mark, add_special_tokens=False)["input_ids"] if form else []
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    if len(of_mark) == 1:
        ends.update(of_mark)
    return {end for end in ends if end is not None}


def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    ends: Collection[int],
    stop_strings: Sequence[str] = (),
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The most likely token at every step, until an end token, a stop string or `max_new_tokens`.

    Args:
        model: a causal language model, bare or adapted.
        tokenizer: its tokenizer.
        prompts: token ids.
        max_new_tokens: longest answer.
        ends: tokens that end an answer; no part of it.
        stop_strings: text that ends an answer; no part of it.
        batch_tokens: rows × slots of a batch; memory grows with it.
        on_progress: told (answers done, answers wanted).

    Returns:
        the answers in the order of the prompts, without special tokens and surrounding white space.

    Raises:
        InvalidInput: an empty prompt, or one too long for the model.
    """
    answers = [""] * len(prompts)
    done = 0
    with judging(model):
        cache = PromptCache(model, prompts, max_new_tokens) if prompts else None
        if cache is not None and cache.usable:
            batches = _cached(cache, tokenizer, prompts, max_new_tokens, set(ends), stop_strings, batch_tokens)
        else:
            batches = _uncached(model, prompts, max_new_tokens, set(ends), batch_tokens)
        for places, generated in batches:
            for place, tokens in zip(places, generated, strict=True):
                answers[place] = _cut(tokenizer.decode(tokens, skip_special_tokens=True), stop_strings).strip()
            done += len(places)
            if on_progress:
                on_progress(done, len(prompts))
    return answers


def _cached(
    cache: PromptCache,
    tokenizer: Any,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    ends: set[int],
    stop_strings: Sequence[str],
    batch_tokens: int,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Rows leave the batch as soon as they are finished."""
    for places in in_batches([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens):
        reading = cache.read([prompts[place] for place in places])
        generated: list[list[int]] = [[] for _ in places]
        active = list(range(len(places)))
        for step in range(max_new_tokens):
            tokens = reading.logits.argmax(dim=-1)
            going = []
            for row, token in enumerate(tokens.tolist()):
                answer = generated[active[row]]
                if token in ends:
                    continue
                answer.append(token)
                if not (stop_strings and _stopped(tokenizer.decode(answer, skip_special_tokens=True), stop_strings)):
                    going.append(row)
            if not going or step == max_new_tokens - 1:
                break
            if len(going) < len(active):
                rows = torch.tensor(going, device=tokens.device)
                reading.select(rows)
                tokens = tokens[rows]
                active = [active[row] for row in going]
            reading.step(tokens[:, None])
        yield places, generated


def _uncached(
    model: Any, prompts: Sequence[Ids], max_new_tokens: int, ends: set[int], batch_tokens: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """transformers' own generation, on rows of equal length: no padding, so nothing that a model could trip over."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=min(ends, default=0)
    )
    of_length: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        of_length[len(prompt)].append(place)
    device = next(model.parameters()).device
    for length, same in of_length.items():
        for batch in in_batches([length + max_new_tokens] * len(same), batch_tokens):
            places = [same[index] for index in batch]
            ids = torch.tensor([list(prompts[place]) for place in places], device=device)
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            generated = [_until(row[length:].tolist(), ends) for row in output]
            yield places, generated


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _stopped(text: str, stop_strings: Sequence[str]) -> bool:
    return any(stop in text for stop in stop_strings)


def _cut(text: str, stop_strings: Sequence[str]) -> str:
    for stop in stop_strings:
        text = text.partition(stop)[0]
    return text
