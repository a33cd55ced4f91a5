"""Sampled continuations of one prompt, many at a time; the prompt is read once."""

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.files import write_whole
from training.evaluation.prompt_cache import Ids, PromptCache, judging

SECONDS_BETWEEN = 10.0  # of keeping what is under way
MOST_DRAWS = 16  # of a token that turns out to lie outside the nucleus, before all are sorted
BLOCK = 512  # tokens whose probabilities are summed up before anything is looked for among them


@dataclass(frozen=True, slots=True)
class Sampled:
    """One continuation: its tokens, less the one that ended it, and whether one did."""

    tokens: tuple[int, ...]
    ended: bool


class Unfinished:
    """Where a sampling that is under way is kept, so that one that was stopped goes on within its lists.

    Args:
        path: a file.
        of: names what is sampled; a file of anything else does not count.
    """

    def __init__(self, path: Path, of: str) -> None:
        self._path, self._of = path, of
        self._due = time.monotonic() + SECONDS_BETWEEN

    def read(self, generator: torch.Generator) -> tuple[list[list[int]], list[bool], list[int]] | None:
        """Tokens written, which rows have ended, and which go on; the generator is put where it was. None: nothing."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if kept["of"] != self._of:
            return None
        generator.set_state(torch.tensor(list(bytes.fromhex(kept["generator"])), dtype=torch.uint8))
        return kept["written"], kept["ended"], kept["active"]

    def write(self, written: list[list[int]], ended: list[bool], active: list[int], generator: torch.Generator) -> None:
        """Keep it, where the last time was long enough ago."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + SECONDS_BETWEEN
        kept = {"of": self._of, "written": written, "ended": ended, "active": active}
        kept["generator"] = bytes(generator.get_state().tolist()).hex()
        write_whole(self._path, json.dumps(kept))

    def done(self) -> None:
        """What was sampled is kept elsewhere."""
        self._path.unlink(missing_ok=True)


def sampled(
    model: nn.Module,
    prompt: Ids,
    rows: int,
    *,
    max_new_tokens: int,
    ends: Collection[int],
    temperature: float = 1.0,
    top_p: float = 0.95,
    generator: torch.Generator,
    enough: Callable[[list[int]], bool] = lambda tokens: False,
    unfinished: Unfinished | None = None,
) -> list[Sampled]:
    """`rows` continuations of `prompt`, by nucleus sampling (Holtzman et al., arXiv 1904.09751).

    Args:
        model: a causal language model, bare or adapted.
        prompt: token ids.
        rows: how many.
        max_new_tokens: most tokens of one.
        ends: tokens that end one.
        temperature: that logits are divided by.
        top_p: probability of the smallest set of most probable tokens that is drawn from.
        generator: on the CPU, whatever the model is on.
        enough: told a continuation's tokens after each; stops it, as if cut off.
        unfinished: where it is kept how far it is.

    Raises:
        InvalidInput: a prompt that is empty, or with `max_new_tokens` too long for the model.
    """
    with judging(model):
        cache = PromptCache(model, [prompt] * rows, max_new_tokens)
        before = unfinished.read(generator) if unfinished else None
        written, ended, active = before or ([[] for _ in range(rows)], [False] * rows, list(range(rows)))
        texts = [[*prompt, *written[row]] for row in active]  # of one length: all have gone the same steps
        reading = cache.read(texts) if cache.usable else _Rereading(model, texts)
        for step in range(len(written[active[0]]), max_new_tokens):
            tokens = nucleus(reading.logits, temperature, top_p, generator)
            going = []
            for place, token in enumerate(tokens.tolist()):
                row = active[place]
                if token in ends:
                    ended[row] = True
                    continue
                written[row].append(token)
                if not enough(written[row]):
                    going.append(place)
            if not going or step == max_new_tokens - 1:
                break
            if len(going) < len(active):
                left = torch.tensor(going, device=tokens.device)
                reading.select(left)
                tokens, active = tokens[left], [active[place] for place in going]
            reading.step(tokens[:, None])
            if unfinished:
                unfinished.write(written, ended, active, generator)
    return [Sampled(tuple(tokens), end) for tokens, end in zip(written, ended, strict=True)]


def nucleus(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token for each row of `logits` [B, V], drawn from its nucleus: [B].

    A token drawn from all of them belongs to the nucleus if the more probable ones have less than `top_p` together;
    one that does not is drawn again. So nothing is sorted, which for 262,144 tokens takes longer than the model does.
    Random numbers come from the CPU, so that a seed means the same tokens on every device, up to rounding.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    probabilities, short = scaled.softmax(dim=-1), -logits.shape[-1] % BLOCK
    padded = nn.functional.pad(probabilities, (0, short)) if short else probabilities
    blocks = padded.view(len(logits), -1, BLOCK)
    sums, peaks = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64), blocks.amax(dim=-1)
    tokens = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    left = torch.arange(len(logits), device=logits.device)
    for _ in range(MOST_DRAWS):
        uniform = torch.rand(len(left), 1, dtype=torch.float64, generator=generator).to(sums.device)
        drawn = _place(blocks, sums, left, uniform).clamp_max(logits.shape[-1] - 1)
        tokens[left] = drawn
        left = left[_above(blocks, peaks, left, probabilities[left, drawn]) >= top_p]
        if not len(left):
            return tokens
    ordered, places = probabilities[left].sort(dim=-1, descending=True)  # a small nucleus of a flat distribution
    kept = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
    drawn = torch.multinomial(kept.cpu(), 1, generator=generator).to(places.device)
    tokens[left] = places.gather(-1, drawn)[:, 0]
    return tokens


def _place(blocks: Tensor, sums: Tensor, rows: Tensor, uniform: Tensor) -> Tensor:
    """Where the cumulative probability of each of `rows` passes its share `uniform` [R, 1] of the whole: [R].

    Args:
        blocks: [B, N, BLOCK] probabilities.
        sums: [B, N], cumulative ones up to each block's end.
    """
    ends = sums[rows]
    wanted = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, wanted, right=True).clamp_max(ends.shape[-1] - 1)
    before = nn.functional.pad(ends, (1, 0)).gather(-1, block)
    within = blocks[rows, block[:, 0]].cumsum(dim=-1, dtype=torch.float64)
    place = torch.searchsorted(within, wanted - before, right=True).clamp_max(BLOCK - 1)
    return (block * BLOCK + place)[:, 0]


def _above(blocks: Tensor, peaks: Tensor, rows: Tensor, bounds: Tensor) -> Tensor:
    """The probability of all that is more probable than its bound [R], in each of `rows`: [R].

    Only blocks whose peak [B, N] is above it are looked into, which in a language model's distribution are few.
    """
    place, block = (peaks[rows] > bounds[:, None]).nonzero(as_tuple=True)
    within = blocks[rows[place], block]
    found = within.where(within > bounds[place, None], 0.0).sum(dim=-1)
    return torch.zeros_like(bounds).index_add(0, place, found)


class _Rereading:
    """As a `Reading`, of a model without a KV cache: the whole text is read again at every step."""

    def __init__(self, model: Any, texts: Sequence[Ids]) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._ids = torch.tensor([list(text) for text in texts], device=device)
        self.logits: Tensor = model(input_ids=self._ids).logits[:, -1]

    def select(self, rows: Tensor) -> None:
        self._ids = self._ids[rows]

    def step(self, tokens: Tensor) -> None:
        self._ids = torch.cat([self._ids, tokens], dim=1)
        self.logits = self._model(input_ids=self._ids).logits[:, -1]
