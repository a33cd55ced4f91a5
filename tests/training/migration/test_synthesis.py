"""Rounds of written lists until there are enough inputs, whatever a discriminator says and however often it stops."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import InvalidInput, RegraftError
from tests.tiny_models import tiny_llama, tiny_tokenizer
from training.evaluation.sampling import Sampled
from training.migration import synthesis
from training.migration.options import SynthesisOptions
from training.migration.synthesis import Pool, synthesise

SEEDS = ["zebra apple", "yak quince", "wren lemon"]
OPTIONS = SynthesisOptions(items=4, rows=3)
WORDS = [f"{first}{second}{third}" for first in "bcdfglmn" for second in "aeiou" for third in ("mp", "rn", "ck", "sh")]


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the place of a model: goes on with the list, two words an item, the last one cut off; remembers the lists."""
    tokenizer, lists = tiny_tokenizer(), []

    def write(model: Any, prompt: Any, rows: int, *, generator: torch.Generator, **rest: Any) -> list[Sampled]:
        lists.append(tokenizer.decode(prompt))
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        written = []
        for _ in range(rows):
            items = [" ".join(rng.sample(WORDS, 2)) for _ in range(3)]
            text = f" {items[0]}\n5. {items[1]}\n6. {items[2]}\n7. {items[0][:2]}"
            written.append(Sampled(tuple(tokenizer(text)["input_ids"]), False))
        return written

    monkeypatch.setattr(synthesis, "sampled", write)
    return lists


def run(
    wanted: int = 20,
    *,
    margins: Any = None,
    refusing: bool = True,
    least: int | None = None,
    seed: int = 0,
    kept_in: Path | None = None,
    **changes: Any,
) -> Pool:
    return synthesise(
        tiny_llama(),
        tiny_tokenizer(),
        "words",
        SEEDS,
        wanted,
        OPTIONS.model_copy(update=changes),
        seed=seed,
        margins=margins,
        refusing=refusing,
        least=least,
        kept_in=kept_in,
    )


def without(letter: str) -> Callable[[Sequence[str]], list[float]]:
    return lambda texts: [-1.0 if letter in text else 1.0 for text in texts]


def test_as_many_different_inputs_as_are_wanted(writer: list[str]) -> None:
    told: list[tuple[int, int, str]] = []
    pool = synthesise(
        tiny_llama(), tiny_tokenizer(), "words", SEEDS, 40, OPTIONS, seed=0, on_progress=lambda *at: told.append(at)
    )
    assert len(set(pool.inputs)) == 40
    assert not set(pool.inputs) & set(SEEDS)
    assert pool.written == 3 * pool.dropped["unfinished"], "each list has three inputs and the beginning of a fourth"
    assert pool.rounds[0].unfinished == OPTIONS.rows
    assert pool.acceptance is None, "nothing judged them"
    assert told[0] == (0, 40, "") and told[-1] == (40, 40, "") and told == sorted(told)


def test_it_tells_how_many_more_are_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [tiny_tokenizer()(text)["input_ids"] for text in (" abc\n3. de\n4. fgh\n5.", " ijk\n3. l")]

    def write(*_: Any, enough: Callable[[list[int]], bool], **rest: Any) -> list[Sampled]:
        written: list[list[int]] = [[], []]
        for tokens, ids in zip(written, lists, strict=True):
            for token in ids:
                tokens.append(token)
                stopped = enough(tokens)
            assert stopped is (ids is lists[0]), "it has all three items"
        return [Sampled(tuple(tokens), False) for tokens in written]

    monkeypatch.setattr(synthesis, "sampled", write)
    told: list[tuple[int, int, str]] = []
    options = SynthesisOptions(items=3, rows=2)
    synthesise(
        tiny_llama(), tiny_tokenizer(), "words", ["x"], 4, options, seed=0, on_progress=lambda *at: told.append(at)
    )
    more = [f"and {count} more, not looked at yet" for count in range(1, 5)]
    assert told == [(0, 4, ""), *((0, 4, note) for note in more), (4, 4, "")]


def test_no_more_lists_are_written_than_are_lacking(writer: list[str]) -> None:
    assert run(1, rows=50).rounds[0].unfinished == 1
    assert run(40, rows=50).rounds[0].unfinished == 1.5 * 40 / OPTIONS.items


def test_where_little_of_a_list_is_kept_more_are_begun(writer: list[str]) -> None:
    others = iter([-1.0])

    def margins(texts: Sequence[str]) -> list[float]:
        return [1.0, *(len(texts) - 1) * [next(others, 1.0)]]

    first, second = run(8, margins=margins, rows=64).rounds
    assert (first.lists, len(first.kept)) == (3, 1), "three lists of four are enough, if two thirds are kept"
    assert second.lists == 21, "three for each of the seven that are lacking"


def test_every_round_shows_the_seeds_in_another_order(writer: list[str]) -> None:
    run(40)
    assert all(text.startswith("7 examples of words:\n\n1. ") and text.endswith("\n4.") for text in writer)
    assert all(seed in text for text in writer for seed in SEEDS)
    assert len(set(writer)) > 1


def test_a_discriminator_that_refuses_a_letter_leaves_none_of_it(writer: list[str]) -> None:
    pool = run(30, margins=without("m"))
    assert len(pool.inputs) == 30
    assert not any("m" in text for text in pool.inputs)
    refused = [text for made in pool.rounds for text in made.refused]
    assert refused and all("m" in text for text in refused)
    kept = sum(len(made.kept) for made in pool.rounds)
    assert pool.acceptance == kept / (kept + len(refused))


def test_without_refusing_all_are_kept_with_how_real_they_look(writer: list[str]) -> None:
    pool = run(30, margins=without("m"), refusing=False)
    assert len(pool.inputs) == len(pool.margins) == 30
    assert list(pool.margins) == without("m")(pool.inputs)
    judged = [margin > 0 for made in pool.rounds for margin in made.margins]
    assert 0 < sum(judged) < len(judged)
    assert pool.acceptance == sum(judged) / len(judged)


def test_where_the_model_repeats_itself_fewer_will_do(monkeypatch: pytest.MonkeyPatch, writer: list[str]) -> None:
    monkeypatch.setattr(f"{__name__}.WORDS", ["bamp", "dern", "fick", "gosh"])  # twelve inputs of two of them
    pool = run(24, least=6)
    assert 6 <= len(pool.inputs) <= 12
    assert synthesis.PATIENCE * 24 <= pool.written < synthesis.PATIENCE * 24 + 3 * OPTIONS.rows
    assert len(run(24, least=6, most_tries=2).inputs) >= 6, "enough, before patience is at its end"
    with pytest.raises(RegraftError, match="13 are wanted"):
        run(24, least=13, most_tries=8)


def test_a_model_that_hardly_ever_finishes_an_input_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def write(*_: Any, **__: Any) -> list[Sampled]:
        calls.append(1)
        text = " apple pie\n5. pe" if len(calls) == 1 else " pe"
        return [Sampled(tuple(tiny_tokenizer()(text)["input_ids"]), False)] * 3

    monkeypatch.setattr(synthesis, "sampled", write)
    with pytest.raises(RegraftError, match="1 were kept; 5 are wanted"):
        run(5, most_tries=2)
    assert len(calls) == 34  # 10 × 2 × 5 cut-off lists, three a round
    del calls[:]
    assert len(run(5, least=1, most_tries=2).inputs) == 1, "with as few as will do it goes on"


def test_a_list_that_can_bring_no_more_items_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = tiny_tokenizer(), []

    def write(*_: Any, enough: Callable[[list[int]], bool], **rest: Any) -> list[Sampled]:
        asked.append(enough)
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesis, "sampled", write)
    with pytest.raises(KeyboardInterrupt):
        synthesise(tiny_llama(), tokenizer, "words", SEEDS, 5, OPTIONS, seed=0, longest=12)
    (enough,) = asked
    for text, stops in (
        (" apple\n5. pear", False),
        (" apple\n5. pear\n6. fig\n7. plum", False),
        (" apple\n5. pear\n6. fig\n7. plum\n8.", True),
        (" apple\n\nThat", True),
        (" apples and pears and figs", False),
        (" apples and pears and figs and a plum", True),
        (" apple\n5. apples and pears and figs\n6", False),
        (" apple\n5. apples and pears and figs and a plum", True),
    ):
        assert enough(tokenizer(text)["input_ids"]) == stops, text


def test_a_discriminator_that_refuses_everything_ends_it_with_the_numbers(writer: list[str]) -> None:
    with pytest.raises(RegraftError) as refused:
        run(10, margins=lambda texts: [-1.0] * len(texts), most_tries=4)
    assert "0 were kept; 10 are wanted" in refused.value.what
    assert "did not look real" in refused.value.what
    assert len(writer) == 5  # 4 × 10 inputs, nine a round


def test_a_model_that_finishes_nothing_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "sampled", lambda *_, **__: [Sampled((40, 41), False)])
    with pytest.raises(RegraftError, match="Of 0 inputs that the model finished"):
        run(10)


def test_a_seed_means_the_same_inputs(writer: list[str]) -> None:
    assert run(seed=1) == run(seed=1)
    assert run(seed=1).inputs != run(seed=2).inputs


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_synthesis_that_was_stopped_goes_on_to_the_same_inputs(
    writer: list[str], tmp_path: Path, stopped_after: int
) -> None:
    whole = run(40, margins=without("m"))
    rounds = 0

    def dies(texts: Sequence[str]) -> list[float]:
        nonlocal rounds
        rounds += 1
        if rounds > stopped_after:
            raise KeyboardInterrupt
        return without("m")(texts)

    with pytest.raises(KeyboardInterrupt):
        run(40, margins=dies, kept_in=tmp_path / "pool.jsonl")
    assert len((tmp_path / "pool.jsonl").read_text().splitlines()) == stopped_after
    del writer[:]
    assert run(40, margins=without("m"), kept_in=tmp_path / "pool.jsonl") == whole
    assert len(writer) == len(whole.rounds) - stopped_after
    assert run(40, margins=dies, kept_in=tmp_path / "pool.jsonl") == whole, "nothing is left to do"


def test_inputs_of_other_settings_are_not_gone_on_with(writer: list[str], tmp_path: Path) -> None:
    run(kept_in=tmp_path / "pool.jsonl")
    with pytest.raises(InvalidInput, match="written by other settings"):
        run(kept_in=tmp_path / "pool.jsonl", temperature=0.5)


def test_a_small_context_gets_fewer_items_then_fewer_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[str] = []

    def write(model: Any, prompt: Any, rows: int, *, max_new_tokens: int, **rest: Any) -> list[Sampled]:
        assert len(prompt) + max_new_tokens <= 256
        lists.append(tiny_tokenizer().decode(prompt))
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesis, "sampled", write)
    for length in (10, 40, 80):
        seeds = [letter * length for letter in "xyz"]
        with pytest.raises(KeyboardInterrupt):
            synthesise(tiny_llama(), tiny_tokenizer(), "words", seeds, 5, OPTIONS, seed=0)
    assert [text.partition(" ")[0] for text in lists] == ["7", "4", "2"]  # three seeds and four, or one; one and one
    with pytest.raises(InvalidInput, match="the model reads at most 256"):
        synthesise(tiny_llama(), tiny_tokenizer(), "words", ["x" * 120], 5, OPTIONS, seed=0)


def test_without_seeds_there_is_nothing_to_write() -> None:
    with pytest.raises(InvalidInput, match="Without a seed"):
        synthesise(tiny_llama(), tiny_tokenizer(), "words", [], 5, OPTIONS, seed=0)


def test_a_real_model_writes_and_is_left_as_it_was() -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pool = synthesise(model, tiny_tokenizer(), "words", ["ab", "cd"], 3, SynthesisOptions(items=2, rows=32), seed=0)
    assert len(set(pool.inputs)) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
