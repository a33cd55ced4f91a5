"""Perplexity filter: the oracles are the model's own loss, and a loop over tokens."""

import json
import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from infra.errors import Conflict, InvalidInput
from tests.tiny_models import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.training.selection.pool_files import pool_of
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.data.rows import Columns
from training.selection import perplexity, pieces
from training.selection.perplexity import Pair, Scores, completion_pair, lowest, relative, score, text_pair, together
from training.selection.pool import Pool, open_pool

TOKENIZER = tiny_tokenizer()
PROMPTS = PromptFormat(TOKENIZER)
TEXTS = [f"{'text ' * (number % 7)}number {number * 37}" for number in range(14)]


def pool_of_pairs(folder: Path, pairs: list[tuple[str, str]]) -> Pool:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in pairs))
    return open_pool([path], Columns())


def by_own_loss(model: torch.nn.Module, pair: Pair) -> float:
    given, judged = (list(part) for part in pair)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([given + judged]), labels=torch.tensor([[-100] * len(given) + judged])
        ).loss.item()


def token_by_token(model: torch.nn.Module, pair: Pair) -> float:
    ids, total = list(pair[0]), 0.0
    for token in pair[1]:
        with torch.no_grad():
            total -= model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)[token].item()
        ids.append(token)
    return total / len(pair[1])


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_perplexity_is_exp_of_the_models_own_loss_and_of_a_loop_over_tokens(build, batch_tokens, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, as_pair = build(), completion_pair(PROMPTS)
    pool = pool_of_pairs(tmp_path, [(f"Say {text[:9]}", text) for text in TEXTS])
    scores = score(pool, model, as_pair, file=tmp_path / "scores", scorer="tiny", batch_tokens=batch_tokens)
    (block,) = pool.blocks()
    pairs = [as_pair(example) for example in block.examples]
    assert scores.positions.tolist() == list(range(14)) and scores.failures == ()
    assert scores.tokens.tolist() == [len(text.encode()) + 2 for text in TEXTS]  # " " before it and the end mark
    assert scores.perplexities == pytest.approx([math.exp(by_own_loss(model, pair)) for pair in pairs], rel=1e-5)
    assert scores.losses[:2] == pytest.approx([token_by_token(model, pair) for pair in pairs[:2]], rel=1e-5)


def test_a_text_is_judged_as_it_is_learnt_after_the_start_mark_or_its_first_token(tmp_path: Path) -> None:
    example = Example("abc", "")
    ids = TOKENIZER("abc</s>", add_special_tokens=False)["input_ids"]
    assert text_pair(PROMPTS, 100)(example) == (ids[:1], ids[1:])
    assert text_pair(PROMPTS, 3)(example) == (ids[:1], ids[1:3])
    marking = tiny_tokenizer()
    marking.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert text_pair(PromptFormat(marking), 100)(example) == ([1], ids)
    model, pool = tiny_llama(), pool_of(tmp_path, TEXTS)
    scores = score(pool, model, text_pair(PROMPTS, 100), file=tmp_path / "scores", scorer="tiny", batch_tokens=100)
    wanted = [by_own_loss(model, text_pair(PROMPTS, 100)(Example(text, ""))) for text in TEXTS]
    assert scores.losses == pytest.approx(wanted, rel=1e-5)


def test_rows_with_one_condition_do_not_share_one_huge_batch(tmp_path: Path) -> None:
    model, slots = tiny_llama(), []
    model.register_forward_hook(lambda module, args, output: slots.append(output.logits.shape[:2].numel()))
    texts = ["The beginning" + " and more" * (number % 3) for number in range(40)]
    score(pool_of(tmp_path, texts), model, text_pair(PROMPTS, 99), file=tmp_path / "s", scorer="t", batch_tokens=128)
    assert 64 < max(slots) <= 128


def test_a_row_that_cannot_be_scored_is_listed_and_the_others_are_scored(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.data[TOKENIZER("~", add_special_tokens=False)["input_ids"][0]] = float("nan")
    texts = [*TEXTS[:6], "with ~ inside", "x" * 300, *TEXTS[6:]]
    pool = pool_of(tmp_path, texts)
    scores = score(pool, model, text_pair(PROMPTS, 1000), file=tmp_path / "scores", scorer="tiny")
    assert [position for position, _ in scores.failures] == [6, 7]
    assert (
        "not numbers (NaN)" in scores.failures[0][1]
        and "301 tokens; the model reads at most 256" in scores.failures[1][1]
    )
    assert scores.positions.tolist() == [row for row in range(16) if row not in (6, 7)]
    clean = score(pool_of(tmp_path, TEXTS), model, text_pair(PROMPTS, 1000), file=tmp_path / "clean", scorer="tiny")
    assert scores.losses == pytest.approx(clean.losses, rel=1e-5)
    assert not {6, 7} & set(lowest(scores, 1.0).tolist()) and len(lowest(scores, 0.2)) == 2


def test_an_impossible_row_has_no_score(tmp_path: Path) -> None:
    model = tiny_llama()
    forward = model.lm_head.forward
    token = TOKENIZER("~", add_special_tokens=False)["input_ids"][0]
    mask = torch.zeros(model.config.vocab_size)
    mask[token] = -math.inf
    model.lm_head.forward = lambda hidden: forward(hidden) + mask  # type: ignore[method-assign]
    scores = score(pool_of(tmp_path, ["a~", "ab"]), model, text_pair(PROMPTS, 9), file=tmp_path / "s", scorer="t")
    assert scores.failures == ((0, "Its perplexity is infinite."),) and scores.positions.tolist() == [1]


def test_a_model_that_scores_nothing_is_no_judge(tmp_path: Path) -> None:
    model = tiny_llama()
    model.lm_head.weight.data[:] = float("nan")
    scores = score(pool_of(tmp_path, TEXTS[:3]), model, text_pair(PROMPTS, 99), file=tmp_path / "s", scorer="t")
    with pytest.raises(InvalidInput, match="None of the 3 rows could be scored; the first one: The model's outputs"):
        lowest(scores, 0.5)


class Stopped(Exception):
    pass


def test_scoring_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_BLOCK_ROWS", 4)
    model, as_pair, pool = tiny_llama(), text_pair(PROMPTS, 100), pool_of(tmp_path, TEXTS)
    whole = score(pool, model, as_pair, file=tmp_path / "whole", scorer="tiny")
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if done == 12:
            raise Stopped

    with pytest.raises(Stopped):
        score(pool, model, as_pair, file=tmp_path / "scores", scorer="tiny", on_progress=stop)
    torn = (tmp_path / "scores").read_bytes()[:-5]  # killed while it wrote the third block
    (tmp_path / "scores").write_bytes(torn)
    judged: list[str] = []

    def watched(example: Example) -> Pair:
        judged.append(example.prompt)
        return as_pair(example)

    resumed = score(pool, model, watched, file=tmp_path / "scores", scorer="tiny")
    assert judged == TEXTS[8:]
    assert (tmp_path / "scores").read_bytes() == (tmp_path / "whole").read_bytes()
    assert np.array_equal(resumed.losses, whole.losses) and resumed.positions.tolist() == whole.positions.tolist()
    assert told == [(4, 14), (8, 14), (12, 14)]


def test_a_file_of_other_scores_is_refused(tmp_path: Path) -> None:
    model, as_pair = tiny_llama(), text_pair(PROMPTS, 100)
    score(pool_of(tmp_path, TEXTS), model, as_pair, file=tmp_path / "scores", scorer="tiny")
    before = (tmp_path / "scores").read_bytes()
    with pytest.raises(Conflict, match="is not of large"):
        score(pool_of(tmp_path, TEXTS), model, as_pair, file=tmp_path / "scores", scorer="large")
    (tmp_path / "pool.jsonl").write_text("\n" + (tmp_path / "pool.jsonl").read_text())  # the same, one line further on
    with pytest.raises(Conflict, match="scores of other rows"):
        score(open_pool([tmp_path / "pool.jsonl"]), model, as_pair, file=tmp_path / "scores", scorer="tiny")
    with pytest.raises(Conflict, match="scores of other rows"):
        score(pool_of(tmp_path, TEXTS[1:]), model, as_pair, file=tmp_path / "scores", scorer="tiny")
    (tmp_path / "notes").write_text("my notes\n")
    with pytest.raises(Conflict, match="something else than scores"):
        score(pool_of(tmp_path, TEXTS), model, as_pair, file=tmp_path / "notes", scorer="tiny")
    assert (tmp_path / "scores").read_bytes() == before and (tmp_path / "notes").read_text() == "my notes\n"


def test_blocks_and_shards_make_no_difference_but_of_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
    model, as_pair, pool = tiny_llama(), text_pair(PROMPTS, 100), pool_of(tmp_path, TEXTS)
    whole = score(pool, model, as_pair, file=tmp_path / "whole", scorer="tiny")
    for rows in (1, 7):
        monkeypatch.setattr(perplexity, "_BLOCK_ROWS", rows)
        parts = [
            score(shard, model, as_pair, file=tmp_path / f"{rows}-{number}", scorer="tiny")
            for number, shard in enumerate(pool.shards(9))  # some of them empty
        ]
        found = together(parts)
        assert found.positions.tolist() == whole.positions.tolist() and found.tokens.tolist() == whole.tokens.tolist()
        assert found.losses == pytest.approx(whole.losses, rel=1e-5)


def scores_of(perplexities: list[float], tokens: list[int] | None = None) -> Scores:
    rows = len(perplexities)
    return Scores(np.arange(rows) * 2, np.log(np.array(perplexities)), np.array(tokens or [5] * rows))


@given(st.lists(st.sampled_from([1.5, 2.0, 3.0, 7.0]), min_size=1, max_size=40), st.integers(1, 100))
def test_the_lowest_share_is_kept_in_order_and_of_equal_rows_the_first(perplexities: list[float], percent: int) -> None:
    wanted = percent * len(perplexities) // 100
    scores = scores_of(perplexities)
    if not wanted:
        with pytest.raises(InvalidInput, match="is nothing"):
            lowest(scores, percent / 100)
        return
    kept = lowest(scores, percent / 100).tolist()
    by_rank = sorted(range(len(perplexities)), key=lambda row: (perplexities[row], row))[:wanted]
    assert kept == [2 * row for row in sorted(by_rank)]


def test_a_floor_drops_what_is_too_easy_and_counts_it_in_the_share() -> None:
    assert lowest(scores_of([1.01, 5, 4, 3, 2]), 0.6, floor=1.5).tolist() == [4, 6, 8]
    assert lowest(scores_of([1.01, 1.02, 4, 3]), 0.75, floor=1.5).tolist() == [4, 6]
    with pytest.raises(InvalidInput, match="is nothing"):
        lowest(scores_of([1.01, 1.02]), 1.0, floor=1.5)


def test_each_band_of_lengths_keeps_its_own_share() -> None:
    scores = scores_of([9, 8, 7, 6, 3, 2, 4, 5], tokens=[3, 3, 9, 9, 10, 10, 50, 50])
    assert lowest(scores, 0.5).tolist() == [8, 10, 12, 14]
    assert lowest(scores, 0.5, bands=(10, 30)).tolist() == [4, 6, 10, 12]
    for bands in ((30, 10), (10, 10)):
        with pytest.raises(InvalidInput, match="not in order"):
            lowest(scores, 0.5, bands=bands)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(InvalidInput, match="no share"):
            lowest(scores, share)


def test_a_relative_score_is_the_ratio_of_two_perplexities() -> None:
    given_scores = Scores(np.array([1, 2, 4]), np.array([1.0, 2.0, 3.0]), np.array([5, 6, 7]), ((0, "too long"),))
    alone = Scores(np.array([0, 1, 4]), np.array([9.0, 1.5, 5.0]), np.array([5, 5, 7]), ((2, "NaN"),))
    found = relative(given_scores, alone)
    assert found.positions.tolist() == [1, 4] and found.losses.tolist() == [-0.5, -2.0]
    assert found.failures == ((0, "too long"), (2, "NaN")) and found.tokens.tolist() == [5, 7]


COLOURS = ["red", "blue", "gold", "grey", "pink", "teal"]
LETTERS = "abcdefghijkl"
AS_COMPLETION = completion_pair(PROMPTS)


def alone(example: Example) -> Pair:
    return AS_COMPLETION(replace(example, prompt="?"))


@cache
def tiny_conditional_model() -> torch.nn.Module:
    """Trained on matched pairs: a letter, and the colours of it and of the next one; also without the letter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny_llama(seed=5).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rng = random.Random(0)
        for _ in range(100):
            batch = [Example(rng.choice(LETTERS), "") for _ in range(16)]
            pairs = [
                (AS_COMPLETION if rng.random() < 0.7 else alone)(replace(example, completion=answer(example.prompt)))
                for example in batch
            ]
            width = max(len(given) + len(judged) for given, judged in pairs)
            ids = torch.tensor(
                [[*given, *judged, *[0] * (width - len(given) - len(judged))] for given, judged in pairs]
            )
            labels = torch.tensor(
                [
                    [*[-100] * len(given), *judged, *[-100] * (width - len(given) - len(judged))]
                    for given, judged in pairs
                ]
            )
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def answer(letter: str) -> str:
    place = LETTERS.index(letter)
    return f"{COLOURS[place % 6]} {COLOURS[place * 5 // 6 % 6]}"


def test_a_model_of_matched_pairs_keeps_shuffled_ones_out(tmp_path: Path) -> None:
    rng = random.Random(1)
    prompts = [rng.choice(LETTERS) for _ in range(200)]
    completions = [answer(prompt) for prompt in prompts]
    noisy = rng.sample(range(200), 60)
    for row, other in zip(noisy, noisy[1:] + noisy[:1], strict=True):
        completions[row] = answer(prompts[other])
    wrong = {row for row in noisy if completions[row] != answer(prompts[row])}
    assert len(wrong) > 40
    pool, model = pool_of_pairs(tmp_path, list(zip(prompts, completions, strict=True))), tiny_conditional_model()
    given_scores = score(pool, model, AS_COMPLETION, file=tmp_path / "given", scorer="tiny, prompts given")
    scores_alone = score(pool, model, alone, file=tmp_path / "alone", scorer="tiny, alone")
    kept = lowest(given_scores, 0.2).tolist()
    assert len(kept) == 40 and len(wrong & set(kept)) <= 1
    ratio = relative(given_scores, scores_alone)

    def area(scores: Scores) -> float:
        """How often a wrong row has a higher score than a right one."""
        bad = np.array([position in wrong for position in scores.positions.tolist()])
        return float((scores.losses[bad][:, None] > scores.losses[~bad][None]).mean())

    assert area(ratio) >= area(given_scores) - 0.01 and area(given_scores) > 0.95
    assert len(wrong & set(lowest(ratio, 0.2).tolist())) <= 1
