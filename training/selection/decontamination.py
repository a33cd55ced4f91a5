"""Rows of a pool that hold a piece of an evaluation set: n-gram overlap (GPT-3, Brown et al. 2020, appendix C)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infra.errors import InvalidInput
from training.data.example import Example
from training.selection.pool import Block, Pool, Positions
from training.selection.word_hashes import Hashes, Runs, ngram_hashes, word_hashes, words

NGRAM_WORDS = 13
PHRASE_WORDS = 4  # fewer are said anywhere: they count only where they are all that a row says
TEMPLATE_ITEMS = 10  # an n-gram of more items of one set is the wording of its questions, not one of them

Text = tuple[str, ...]  # as words
Item = tuple[str, int]  # evaluation set, number of the item in it from 0


@dataclass(frozen=True)
class EvaluationIndex:
    """The n-grams of evaluation sets.

    Args:
        n: words of an n-gram.
        items: by length in words, the items that an n-gram's hash stands for: `n` for n-grams, fewer for short items.
        whole: items too short to be looked for inside of a text, by their words.
        sizes: how many items each set has.
        templates: how many n-grams of each set are left out because they are in more than ten of its items.
    """

    n: int
    items: dict[int, dict[int, tuple[Item, ...]]]
    whole: dict[Text, tuple[Item, ...]]
    sizes: dict[str, int]
    templates: dict[str, int]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A row of the pool that holds a piece of an evaluation set.

    Args:
        position: the row.
        evaluation_set: which one.
        items: numbers of its items that the row holds a piece of, ascending.
        ngram: the first piece, as the row has it.
    """

    position: int
    evaluation_set: str
    items: tuple[int, ...]
    ngram: str


@dataclass(frozen=True)
class Contamination:
    """How much of each evaluation set is in a pool.

    Args:
        overlaps: rows that hold a piece of one, in the pool's order.
        sizes: how many items each set has.
        templates: how many n-grams of each set did not count, because they are in more than ten of its items.
    """

    overlaps: tuple[Overlap, ...]
    sizes: dict[str, int]
    templates: dict[str, int]

    @property
    def dropped(self) -> Positions:
        """Positions of the rows, ascending: what to leave out of the pool."""
        return np.unique(np.array([overlap.position for overlap in self.overlaps], np.int64))

    @property
    def items_hit(self) -> dict[str, int]:
        """How many items of each set have a piece in the pool."""
        hit: dict[str, set[int]] = {name: set() for name in self.sizes}
        for overlap in self.overlaps:
            hit[overlap.evaluation_set].update(overlap.items)
        return {name: len(items) for name, items in hit.items()}


def index(evaluation_sets: Mapping[str, Sequence[Example]], n: int = NGRAM_WORDS) -> EvaluationIndex:
    """What to look for, n-grams of prompts and of completions.

    A prompt of fewer than `n` words is looked for as a whole, of fewer than four only where it is a row's whole text
    or prompt. A shorter completion (`Yes`) is no sign of anything and is left out, and so are n-grams that are in more
    than ten different texts of one set: else rows that only ask in the same words would be taken for its items.

    Args:
        evaluation_sets: items by the name of their set.
        n: words of an n-gram, at least four.

    Raises:
        InvalidInput: a shorter n, or a set without items.
    """
    if n < PHRASE_WORDS:
        raise InvalidInput(f"N-grams of {n} words are in every text.", f"Take at least {PHRASE_WORDS}, better 13.")
    items: dict[int, dict[int, list[Item]]] = {n: defaultdict(list)}
    whole: dict[Text, list[Item]] = defaultdict(list)
    templates: dict[str, int] = {}
    for name, examples in evaluation_sets.items():
        if not examples:
            raise InvalidInput(f"The evaluation set {name} is empty.", "Leave it out, or name its file.")
        texts = _texts(examples, n)
        found, templates[name] = _ngrams({text: owners for text, owners in texts.items() if len(text) >= n}, n)
        for gram, numbers in found.items():
            items[n][gram] += [(name, number) for number in numbers]
        for text, numbers in texts.items():
            owners = [(name, number) for number in numbers]
            if len(text) < PHRASE_WORDS:
                whole[text] += owners
            elif len(text) < n:
                (gram,) = ngram_hashes(word_hashes([text]), len(text)).values.tolist()
                items.setdefault(len(text), defaultdict(list))[gram] += owners
    return EvaluationIndex(
        n,
        {length: {gram: tuple(owners) for gram, owners in grams.items()} for length, grams in sorted(items.items())},
        {text: tuple(owners) for text, owners in whole.items()},
        {name: len(examples) for name, examples in evaluation_sets.items()},
        templates,
    )


def decontaminate(pool: Pool, evaluation_sets: Mapping[str, Sequence[Example]], n: int = NGRAM_WORDS) -> Contamination:
    """Look for pieces of the evaluation sets in a pool. Memory: of the sets' n-grams, and of the overlaps found.

    Raises:
        InvalidInput: see `index`.
    """
    known = index(evaluation_sets, n)
    return report(known, [overlaps(pool, known)])


def overlaps(shard: Pool, known: EvaluationIndex) -> list[Overlap]:
    """The rows of a shard that hold a piece of an evaluation set, in order."""
    keys = {length: np.sort(np.fromiter(grams, np.uint64, len(grams))) for length, grams in known.items.items()}
    return [overlap for block in shard.blocks() for overlap in _overlaps_of(block, known, keys)]


def report(known: EvaluationIndex, found: Iterable[Sequence[Overlap]]) -> Contamination:
    """The `overlaps` of all shards together."""
    return Contamination(
        tuple(overlap for shard in found for overlap in shard), dict(known.sizes), dict(known.templates)
    )


def _overlaps_of(block: Block, known: EvaluationIndex, keys: Mapping[int, Hashes]) -> list[Overlap]:
    texts = [words(text) for text in block.texts]
    hashed = word_hashes(texts)
    hits: dict[tuple[int, str], list[tuple[int, int, int]]] = defaultdict(list)  # (where, words, item) by row and set
    for length, sorted_keys in keys.items():
        for row, where, gram in _matches(ngram_hashes(hashed, length), sorted_keys):
            for name, item in known.items[length][gram]:
                hits[row, name].append((where, length, item))
    for row, example in enumerate(block.examples) if known.whole else ():
        prompt = texts[row] if not example.completion else words(example.prompt)
        for text in {tuple(texts[row]), tuple(prompt)} & known.whole.keys():
            for name, item in known.whole[text]:
                hits[row, name].append((0, len(text), item))
    found = []
    for (row, name), places in sorted(hits.items()):
        where, length, _ = min(places)
        items = tuple(sorted({item for _, _, item in places}))
        found.append(Overlap(int(block.positions[row]), name, items, " ".join(texts[row][where : where + length])))
    return found


def _matches(grams: Runs, sorted_keys: Hashes) -> list[tuple[int, int, int]]:
    """(text, place in it, hash) of the n-grams that are among the keys."""
    if not len(sorted_keys):
        return []
    nearest = np.minimum(np.searchsorted(sorted_keys, grams.values), len(sorted_keys) - 1)
    places = np.flatnonzero(sorted_keys[nearest] == grams.values)
    rows = np.searchsorted(grams.starts, places, side="right") - 1
    return list(zip(rows.tolist(), (places - grams.starts[rows]).tolist(), grams.values[places].tolist(), strict=True))


def _ngrams(texts: Mapping[Text, list[int]], n: int) -> tuple[dict[int, list[int]], int]:
    """The items that each n-gram's hash stands for, and how many n-grams are left out as wording."""
    owners: dict[int, list[Text]] = defaultdict(list)
    hashed = ngram_hashes(word_hashes(list(texts)), n)
    for number, text in enumerate(texts):
        for gram in set(hashed.of(number).tolist()):
            owners[gram].append(text)
    own = {
        gram: [item for text in of for item in texts[text]] for gram, of in owners.items() if len(of) <= TEMPLATE_ITEMS
    }
    return own, len(owners) - len(own)


def _texts(examples: Sequence[Example], n: int) -> dict[Text, list[int]]:
    """The different texts to look for, as words, and the items that each belongs to."""
    texts: dict[Text, list[int]] = defaultdict(list)
    for item, example in enumerate(examples):
        prompt, completion = tuple(words(example.prompt)), tuple(words(example.completion))
        if prompt:
            texts[prompt].append(item)
        if len(completion) >= n and completion != prompt:
            texts[completion].append(item)
    return texts
