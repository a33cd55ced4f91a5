"""The share of a pool that a language model finds least surprising (POINTS, Liu et al. 2024, arXiv 2409.04828)."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import Conflict, InvalidInput
from infra.files import write_whole
from training.data.content_hash import content_hash
from training.data.example import Example, fingerprint
from training.data.prompting import PromptFormat
from training.selection.pool import Block, Pool, Positions

if TYPE_CHECKING:
    from torch import nn

Pair = tuple[Sequence[int], Sequence[int]]  # token ids that are given, and those that are judged

_BLOCK_ROWS = 1024  # between two writes of the scores: so much is lost in a kill


@dataclass(frozen=True)
class Scores:
    """How surprising each row of a pool is.

    Args:
        positions: of the rows that have a score, ascending.
        losses: [rows], mean negative log-likelihood of a token in nats, all finite.
        tokens: [rows], how many tokens were judged.
        failures: position and reason of each row without a score.
    """

    positions: Positions
    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    failures: tuple[tuple[int, str], ...] = ()

    @property
    def perplexities(self) -> NDArray[np.float64]:
        """exp of the losses."""
        return np.exp(self.losses)


def completion_pair(prompts: PromptFormat) -> Callable[[Example], Pair]:
    """Judges a completion, its end mark included, with the prompt as the condition."""
    tokenizer = prompts.tokenizer

    def pair(example: Example) -> Pair:
        given, judged = prompts.training_text(example)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (given, judged))

    return pair


def text_pair(prompts: PromptFormat, longest: int) -> Callable[[Example], Pair]:
    """Judges a plain text as a model learns it, its end mark included, or no more than its first `longest` tokens.

    The condition is the first token: the start mark, where the tokenizer has one.
    """
    tokenizer = prompts.tokenizer

    def pair(example: Example) -> Pair:
        ids = tokenizer(prompts.plain_text(example.text), add_special_tokens=False)["input_ids"]
        return ids[:1], ids[1:longest]

    return pair


def score(
    pool: Pool,
    model: "nn.Module",
    as_pair: Callable[[Example], Pair],
    *,
    file: Path,
    scorer: str,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """The perplexity of each row: exp(−(1/M) Σₜ log p(wₜ | condition, w₁…wₜ₋₁)) over the M tokens that are judged.

    Scores are written block by block, so that a second call with the same file goes on where the first one ended. The
    last digits of a score depend on which rows shared its batch, as with every model.

    Args:
        pool: what to judge.
        model: a causal language model, bare or adapted.
        as_pair: what of a row is given and what is judged: `completion_pair` or `text_pair`.
        file: where the scores are kept.
        scorer: what the scores come from (base, adapter, way of asking); a file of another scorer is refused.
        batch_tokens: rows × slots of a batch; memory grows with it.
        on_progress: told (rows done, rows of the pool).

    Raises:
        Conflict: the file holds the scores of another scorer or of other rows.
    """
    parts = [_scores({"positions": [], "losses": [], "tokens": [], "failures": []})]
    done, total = 0, pool.rows
    for block, line in _lines(pool, model, as_pair, file, scorer, batch_tokens):
        parts.append(_scores(line))
        done += len(block.examples)
        if on_progress:
            on_progress(done, total)
    return together(parts)


def together(shards: Sequence[Scores]) -> Scores:
    """The scores of all shards, in order."""
    return Scores(
        np.concatenate([shard.positions for shard in shards]),
        np.concatenate([shard.losses for shard in shards]),
        np.concatenate([shard.tokens for shard in shards]),
        tuple(failure for shard in shards for failure in shard.failures),
    )


def relative(given: Scores, alone: Scores) -> Scores:
    """log(perplexity with the prompt / perplexity without it): how well a completion fits its prompt.

    Fluent completions of other prompts have a low perplexity, but not a low ratio. Rows that failed in either fail.
    """
    positions, of_given, of_alone = np.intersect1d(
        given.positions, alone.positions, assume_unique=True, return_indices=True
    )
    failures = dict(given.failures) | dict(alone.failures)
    losses = given.losses[of_given] - alone.losses[of_alone]
    return Scores(positions, losses, given.tokens[of_given], tuple(sorted(failures.items())))


def lowest(scores: Scores, share: float, *, floor: float = 0.0, bands: Sequence[int] = ()) -> Positions:
    """The ⌊share · scored⌋ rows of lowest perplexity, in the pool's order; of equal ones the earlier.

    Args:
        scores: of a pool.
        share: of the rows that have a score, 0 < share ≤ 1.
        floor: rows of a lower perplexity are not kept: they repeat themselves, or are boilerplate.
        bands: numbers of tokens at which a new band begins. Each band keeps its own share, so that long texts, whose
            tokens are easier to tell, do not crowd out short ones.

    Raises:
        InvalidInput: a share that is none, bands out of order, or nothing to keep.
    """
    if not 0 < share <= 1:
        raise InvalidInput(f"{share} is no share.", "Give a number above 0, and at most 1.")
    if not len(scores.positions):
        why = f"; the first one: {scores.failures[0][1]}" if scores.failures else ""
        raise InvalidInput(f"None of the {len(scores.failures):,} rows could be scored{why}", "Take another model.")
    if any(low >= high for low, high in pairwise(bands)):
        raise InvalidInput(f"The bands {list(bands)} are not in order.", "Give each length once, the shortest first.")
    band_of = np.searchsorted(np.asarray(bands, np.int64), scores.tokens, side="right")
    kept = []
    for band in range(len(bands) + 1):
        rows = np.flatnonzero(band_of == band)
        number = math.floor(Fraction(str(share)) * len(rows))
        rows = rows[scores.perplexities[rows] >= floor]
        kept.append(rows[np.argsort(scores.losses[rows], kind="stable")[:number]])
    chosen = np.sort(np.concatenate(kept))
    if not len(chosen):
        raise InvalidInput(
            f"A share of {share} of {len(scores.positions):,} rows, perplexity at least {floor:g}, is nothing.",
            "Raise the share, lower the floor, or add to the pool.",
        )
    return scores.positions[chosen]


def _lines(
    pool: Pool, model: "nn.Module", as_pair: Callable[[Example], Pair], file: Path, scorer: str, batch_tokens: int
) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Each block of the pool with its line of the file: read where it is there, else found and written."""
    if not file.exists():
        write_whole(file, json.dumps({"scorer": scorer}) + "\n")
    stored = _stored(file, scorer)
    for block in replace(pool, block_rows=_BLOCK_ROWS).blocks():
        rows = f"{fingerprint(block.examples)} {content_hash(*block.positions.tolist()):016x}"
        line = next(stored, None)
        if line is None:
            line = {"rows": rows, **_scored_block(model, block, as_pair, batch_tokens)}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        elif line["rows"] != rows:
            raise Conflict(f"{file} holds the scores of other rows.", "Name another file, or delete this one.")
        yield block, line


def _stored(file: Path, scorer: str) -> Iterator[dict[str, Any]]:
    """The blocks that a file holds; one whose writing was cut short is taken off its end."""
    begin = 0
    with file.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
            except ValueError:
                raise Conflict(f"{file} holds something else than scores.", "Name another file.") from None
            if begin:
                yield content
            elif content != {"scorer": scorer}:
                raise Conflict(
                    f"{file} is not of {scorer}, but of {content}.", "Name another file, or delete this one."
                )
            begin += len(line)
    os.truncate(file, begin)


def _scores(line: dict[str, Any]) -> Scores:
    return Scores(
        np.array(line["positions"], np.int64),
        np.array(line["losses"], np.float64),
        np.array(line["tokens"], np.int64),
        tuple((int(position), str(reason)) for position, reason in line["failures"]),
    )


def _scored_block(
    model: "nn.Module", block: Block, as_pair: Callable[[Example], Pair], batch_tokens: int
) -> dict[str, Any]:
    """`positions`, `losses`, `tokens` of the rows that can be scored, and `failures`: a line of the file."""
    from training.evaluation.prompt_cache import in_batches, plain_model

    pairs = [as_pair(example) for example in block.examples]
    config = plain_model(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    most = min(batch_tokens, _MOST_LOGITS // config.vocab_size)
    found: dict[int, float | str] = {}
    for row, (given, judged) in enumerate(pairs):
        if not given or not judged:
            found[row] = "It has no token to judge."
        elif len(given) + len(judged) > limit:
            found[row] = f"It has {len(given) + len(judged):,} tokens; the model reads at most {limit:,}."
    rows = [row for row in range(len(pairs)) if row not in found]
    # Batches are cut here: rows with one and the same condition would share a batch, however many they are.
    for batch in in_batches([sum(map(len, pairs[row])) for row in rows], most):
        chosen = [rows[place] for place in batch]
        found.update(zip(chosen, _scored(model, [pairs[row] for row in chosen], most), strict=True))
    good = [row for row in range(len(pairs)) if not isinstance(found[row], str)]
    positions = block.positions.tolist()
    return {
        "positions": [positions[row] for row in good],
        "losses": [found[row] for row in good],
        "tokens": [len(pairs[row][1]) for row in good],
        "failures": [(positions[row], reason) for row in range(len(pairs)) if isinstance(reason := found[row], str)],
    }


_MOST_LOGITS = 2**28  # of one batch: 1 GiB in float32
_INFINITE = math.log(sys.float_info.max)


def _scored(model: "nn.Module", pairs: Sequence[Pair], batch_tokens: int) -> list[float | str]:
    """The loss of each pair, or why it has none. A pair that breaks its batch is searched for by halves."""
    import torch

    from training.evaluation.likelihood import log_likelihoods

    try:
        sums = log_likelihoods(model, pairs, batch_tokens=batch_tokens)
    except (InvalidInput, torch.OutOfMemoryError) as error:
        if len(pairs) == 1:
            return [error.what if isinstance(error, InvalidInput) else "The machine's memory does not hold it."]
        half = len(pairs) // 2
        return [*_scored(model, pairs[:half], batch_tokens), *_scored(model, pairs[half:], batch_tokens)]
    losses = [-total / len(judged) for total, (_, judged) in zip(sums, pairs, strict=True)]
    return [loss if loss < _INFINITE else "Its perplexity is infinite." for loss in losses]
