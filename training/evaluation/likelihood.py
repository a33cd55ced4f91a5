"""Log-likelihoods of continuations; a prompt that several continuations share is read once."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.evaluation.prompt_cache import Ids, PromptCache, in_batches, judging, plain_model

_MOST_LOGITS = 2**28  # of one batch: 1 GiB in float32
_FILL = -1  # no token


def log_likelihoods(
    model: nn.Module,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Σₜ log p(cₜ | prompt, c₁…cₜ₋₁) in nats for each (prompt, continuation c), in float32.

    Args:
        model: a causal language model, bare or adapted.
        pairs: token ids of prompts and of what follows them; pairs with one prompt may be anywhere in the list.
        batch_tokens: rows × slots of a batch; memory grows with it.
        on_progress: told (pairs done, pairs wanted).

    Raises:
        InvalidInput: an empty prompt or continuation, a pair too long for the model, or a model that gives NaN.
    """
    if not pairs:
        return []
    if not all(continuation for _, continuation in pairs):
        raise InvalidInput("An answer is empty once tokenised, so it has no likelihood.", "Remove the item.")
    scores = [0.0] * len(pairs)
    done = 0
    with judging(model):
        prompts = list(dict.fromkeys(tuple(prompt) for prompt, _ in pairs))
        room = max(len(continuation) for _, continuation in pairs)
        cache = PromptCache(model, prompts, room)
        most = min(batch_tokens, _MOST_LOGITS // plain_model(model).config.get_text_config().vocab_size)
        batches = _cached(cache, prompts, pairs, most) if cache.usable else _uncached(model, pairs, most)
        for places, values in batches:
            for place, value in zip(places, values.tolist(), strict=True):
                if math.isnan(value):
                    raise InvalidInput(
                        "The model's outputs are not numbers (NaN), so nothing can be measured.",
                        "Its adapter has probably diverged in training: train with a lower learning rate.",
                    )
                scores[place] = value
            done += len(places)
            if on_progress:
                on_progress(done, len(pairs))
    return scores


def _cached(
    cache: PromptCache, prompts: Sequence[Ids], pairs: Sequence[tuple[Ids, Ids]], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Read the prompts of a batch, then go on with one row a continuation."""
    of_prompt: dict[Ids, list[int]] = {prompt: [] for prompt in prompts}
    for place, (prompt, _) in enumerate(pairs):
        of_prompt[tuple(prompt)].append(place)
    room = max(len(continuation) for _, continuation in pairs)
    slots = [len(places) * (len(prompt) + room) for prompt, places in of_prompt.items()]
    for batch in in_batches(slots, batch_tokens):
        reading = cache.read([prompts[index] for index in batch])
        device = reading.logits.device
        places = [place for index in batch for place in of_prompt[prompts[index]]]
        counts = torch.tensor([len(of_prompt[prompts[index]]) for index in batch], device=device)
        reading.select(torch.arange(len(batch), device=device).repeat_interleave(counts))
        targets = _padded([pairs[place][1] for place in places], device)
        logits = reading.logits[:, None]
        if targets.shape[1] > 1:
            # A row's filler comes after its own tokens, which therefore do not see it.
            logits = torch.cat([logits, reading.step(targets[:, :-1].clamp(min=0))], dim=1)
        yield places, _scores(logits, targets)


def _uncached(
    model: nn.Module, pairs: Sequence[tuple[Ids, Ids]], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """The whole of each pair in one row, filled up on the right: right for whatever reads from left to right."""
    device = next(model.parameters()).device
    for places in in_batches([len(prompt) + len(continuation) for prompt, continuation in pairs], batch_tokens):
        rows = [(*pairs[place][0], *pairs[place][1]) for place in places]
        targets = _padded(
            [[_FILL] * (len(prompt) - 1) + list(continuation) for prompt, continuation in (pairs[p] for p in places)],
            device,
        )
        ids = _padded(rows, device)
        logits = model(input_ids=ids.clamp(min=0), attention_mask=(ids != _FILL).long()).logits
        # Prompt tuning has logits for its virtual tokens, too, in front.
        yield places, _scores(logits[:, -ids.shape[1] : -1], targets)


def _scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over t of log softmax(logits)[t, target t], [B] from [B, T, V] and [B, T]; filler counts nothing."""
    logits = logits.float()
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(dim=-1)
    return chosen.masked_fill(targets == _FILL, 0.0).sum(dim=-1)


def _padded(rows: Sequence[Ids], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[_FILL] * (width - len(row))] for row in rows], device=device)
