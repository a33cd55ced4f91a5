"""Synthetic inputs: lists that a model goes on with, screened, and judged by a discriminator, until there are enough.

Rounds follow each other; each shows the seeds in an order of its own and is drawn from a seed of its own, so that a
stopped synthesis goes on to the same inputs. What a round brought is one line of a file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import ceil, inf
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from infra.errors import InvalidInput, RegraftError
from infra.files import write_whole
from training.evaluation.generation import end_tokens
from training.evaluation.prompt_cache import plain_model
from training.evaluation.sampling import Unfinished, sampled
from training.migration.listing import listing, parse
from training.migration.options import SynthesisOptions
from training.migration.screening import Screen

Margins = Callable[[Sequence[str]], Sequence[float]]

SURPLUS = 1.5  # times the inputs that are lacking are asked for, since some are dropped
ASTRAY = 2  # times the longest real input, from which on nothing more is expected of a list
CUT_OFF = 10  # lists that may end unfinished for each input that may be written
PATIENCE = 2  # times the inputs that are wanted, after which as few as will do must do
SPARE = 1.5  # room for an item that is longer than the seeds


@dataclass
class Round:
    """What one round brought.

    Attributes:
        number: from 0.
        lists: that were begun.
        written: finished inputs.
        unfinished: lists whose last input was cut off.
        dropped: of the finished ones, by the screen's reason.
        refused: of those that passed the screen, what did not look real enough to be kept.
        kept: the rest, in the order in which they were written.
        margins: of these, how real each looks to the discriminator, where there is one.
    """

    number: int
    lists: int = 0
    written: int = 0
    unfinished: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Pool:
    """The synthetic inputs, and how they came about.

    Attributes:
        inputs: as many as were wanted, or a few less.
        margins: how real each of them looks; none where nothing judged them.
        rounds: what each round brought; the last one may have brought more than was wanted.
    """

    inputs: tuple[str, ...]
    margins: tuple[float, ...]
    rounds: tuple[Round, ...]

    @property
    def written(self) -> int:
        """All finished inputs."""
        return sum(made.written for made in self.rounds)

    @property
    def dropped(self) -> Counter[str]:
        """What the screen dropped, by reason, and unfinished inputs."""
        total: Counter[str] = Counter(unfinished=sum(made.unfinished for made in self.rounds))
        for made in self.rounds:
            total.update(made.dropped)
        return +total

    @property
    def acceptance(self) -> float | None:
        """The share of screened inputs that the discriminator took for real; None where nothing judged any."""
        judged = [margin > 0 for made in self.rounds for margin in made.margins]
        judged += [False for made in self.rounds for _ in made.refused]
        return mean(judged) if judged else None


def synthesise(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    seeds: Sequence[str],
    wanted: int,
    options: SynthesisOptions,
    *,
    seed: int,
    longest: int | None = None,
    margins: Margins | None = None,
    refusing: bool = True,
    least: int | None = None,
    kept_in: Path | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Pool:
    """Write `wanted` different inputs like the seeds.

    Args:
        model: writes them: the bare target of a migration, or the bare source to train a discriminator.
        tokenizer: its own.
        name: of the task, in words.
        seeds: real inputs that are shown.
        wanted: how many inputs.
        options: how they are written.
        seed: of everything drawn.
        longest: characters of the longest real input.
        margins: says of inputs how real they look, above zero where they do.
        refusing: keep those alone; else keep all that pass the screen, with their margins.
        least: as few will do, once `PATIENCE` × `wanted` are written. Default: `wanted`.
        kept_in: a file, one round a line; a synthesis that was stopped goes on from it, and from what is kept beside it
            of the round that was under way.
        on_progress: told (kept, wanted, how many more are written of which it is not known yet).

    Raises:
        InvalidInput: no seeds, or seeds too long for the model's context.
        RegraftError: after `most_tries` × `least` written inputs, or `CUT_OFF` times as many lists that were cut off,
            there are still too few.
    """
    if not seeds:
        raise InvalidInput("Without a seed example there is nothing to write more of.", "Give at least one.")
    screen, least = Screen(seeds, longest), wanted if least is None else least
    rounds = []
    origin = _origin(name, seeds, options, seed, longest)
    for made in _stored(kept_in, origin):
        for text in (*made.kept, *made.refused):
            screen.passes(text)
        rounds.append(made)
    tell = on_progress or (lambda kept, wanted, note: None)
    while (kept := sum(len(made.kept) for made in rounds)) < wanted:
        tell_more = partial(tell, kept, wanted)
        tell_more("")
        written, most = sum(made.written for made in rounds), options.most_tries * least
        cut_off = sum(made.unfinished for made in rounds)
        exhausted = written >= most or cut_off >= CUT_OFF * most or _hopeless(rounds)
        if kept >= least and (exhausted or written >= PATIENCE * wanted):
            break
        if exhausted:
            raise _too_few(Pool((), (), tuple(rounds)), kept, least)
        rows = min(options.rows, ceil((wanted - kept) / _expected(rounds, options)))
        under_way = Unfinished(kept_in.with_name(f"{kept_in.stem}-{len(rounds)}.json"), origin) if kept_in else None
        made = _round(
            model,
            tokenizer,
            name,
            seeds,
            len(rounds),
            rows,
            options,
            seed,
            screen,
            margins,
            refusing,
            tell_more,
            under_way,
        )
        rounds.append(made)
        if kept_in is not None:
            _store(kept_in, origin, rounds)
        if under_way is not None:
            under_way.done()
    tell(wanted, wanted, "")
    inputs = [text for made in rounds for text in made.kept]
    looks = [margin for made in rounds for margin in made.margins]
    return Pool(tuple(inputs[:wanted]), tuple(looks[:wanted]), tuple(rounds))


def _round(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    seeds: Sequence[str],
    number: int,
    rows: int,
    options: SynthesisOptions,
    seed: int,
    screen: Screen,
    margins: Margins | None,
    refusing: bool,
    tell_more: Callable[[str], None],
    under_way: Unfinished | None,
) -> Round:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    shown = [seeds[place] for place in torch.randperm(len(seeds), generator=generator).tolist()]
    prompt, shown, items, room = fitting(model, tokenizer, name, shown, options.items)
    astray = inf if screen.longest is None else ASTRAY * screen.longest + len(f"\n{len(shown) + items + 1}.")

    finished: dict[int, int] = {}

    def enough(written: list[int]) -> bool:
        """The list is at its end, or what is written no longer looks like an item."""
        found = parse(tokenizer.decode(written, skip_special_tokens=True), shown)
        if len(found.items) > finished.get(id(written), 0):
            finished[id(written)] = len(found.items)
            tell_more(f"and {sum(finished.values())} more, not looked at yet")
        return found.complete or len(found.items) >= items or len(found.unfinished) > astray

    made = Round(number, rows)
    before = Counter(screen.dropped)
    passed = []
    for continuation in sampled(
        model,
        prompt,
        rows,
        max_new_tokens=room,
        ends=end_tokens(model, tokenizer),
        temperature=options.temperature,
        top_p=options.top_p,
        generator=generator,
        enough=enough,
        unfinished=under_way,
    ):
        found = parse(tokenizer.decode(continuation.tokens, skip_special_tokens=True), shown, ended=continuation.ended)
        made.written += len(found.items[:items])
        made.unfinished += bool(found.unfinished) and len(found.items) < items
        passed += [item for item in found.items[:items] if screen.passes(item)]
    made.dropped = dict(screen.dropped - before)
    if margins is None or not passed:
        made.kept = passed
        return made
    for item, margin in zip(passed, margins(passed), strict=True):
        if refusing and margin <= 0:
            made.refused.append(item)
        else:
            made.kept.append(item)
            made.margins.append(margin)
    return made


def fitting(
    model: nn.Module, tokenizer: Any, name: str, seeds: Sequence[str], items: int
) -> tuple[list[int], list[str], int, int]:
    """A list's tokens, the seeds that it shows, how many items it asks for, and the most tokens that it may go on for.

    Where the model's context is too small for all that was wished, it asks for fewer items, then shows fewer seeds.
    """
    most = getattr(plain_model(model).config.get_text_config(), "max_position_embeddings", None) or inf
    item = max(len(tokenizer(f" {each}\n", add_special_tokens=False)["input_ids"]) for each in seeds) + 3  # its number
    for number in range(len(seeds), 0, -1):
        shown = list(seeds[:number])
        prompt = tokenizer(listing(name, shown, items))["input_ids"]
        fit = min(items, int((most - len(prompt)) / (SPARE * item)) if most < inf else items)
        if fit >= 1:
            return tokenizer(listing(name, shown, fit))["input_ids"], shown, fit, round(SPARE * fit * item)
    raise InvalidInput(
        f"A seed and a new input take {len(prompt) + round(SPARE * item):,} tokens; the model reads at most {most:,}.",
        "Give shorter seeds, or choose a model that reads more.",
    )


def _expected(rounds: Sequence[Round], options: SynthesisOptions) -> float:
    """Inputs that a list will bring: as many as it is asked for, less what is dropped as a rule, or as those before."""
    lists, kept = sum(made.lists for made in rounds), sum(len(made.kept) for made in rounds)
    usual = options.items / SURPLUS
    return min(usual, max(kept, 1) / lists) if lists else usual


def _hopeless(rounds: Sequence[Round]) -> bool:
    """Nothing finished at all in several rounds: more of them will not help."""
    return len(rounds) >= 5 and not any(made.written for made in rounds)


def _too_few(pool: Pool, kept: int, wanted: int) -> RegraftError:
    told = [f"{count:,} {reason}" for reason, count in pool.dropped.most_common()]
    refused = sum(len(made.refused) for made in pool.rounds)
    told += [f"{refused:,} did not look real"] if refused else []
    return RegraftError(
        f"Of {pool.written:,} inputs that the model finished, {kept:,} were kept; {wanted:,} are wanted "
        f"(dropped: {', '.join(told) or 'none'}).",
        "Ask for fewer, give more seeds, or allow more tries (synthesis.most_tries). A base model that finishes hardly "
        "any is not up to the task.",
    )


def _origin(name: str, seeds: Sequence[str], options: SynthesisOptions, seed: int, longest: int | None) -> str:
    """Names what decides the inputs, beside the model and the discriminator."""
    told = [name, *seeds, options.model_dump(), seed, longest, ASTRAY]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _stored(path: Path | None, origin: str) -> Iterator[Round]:
    """The rounds of a synthesis that was stopped."""
    if path is None or not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        content = json.loads(line)
        if content.pop("of") != origin:
            raise InvalidInput(f"{path} holds inputs that were written by other settings.", f"rm {path}")
        yield Round(**content)


def _store(path: Path, origin: str, rounds: Sequence[Round]) -> None:
    """Write all rounds anew, so that the file is whole at any moment."""
    write_whole(path, "".join(f"{json.dumps({'of': origin, **asdict(made)})}\n" for made in rounds))
