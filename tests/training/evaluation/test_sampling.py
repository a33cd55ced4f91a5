"""Sampled continuations: the right distribution, one prompt read once, each row as long as it goes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from tests.tiny_models import tiny_gemma3, tiny_gpt2, tiny_llama
from training.evaluation import sampling
from training.evaluation.sampling import Sampled, Unfinished, nucleus, sampled

PROMPT = [1, 40, 41, 42, 43, 44]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("vocabulary", [20, 700])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_tokens_come_from_the_nucleus_as_often_as_they_should(vocabulary: int, top_p: float) -> None:
    logits = 2 * torch.randn(1, vocabulary, generator=generator(1))
    expected = TopPLogitsWarper(top_p)(None, logits / 0.7).softmax(-1)[0]
    draws = 20_000
    counts = nucleus(logits.expand(draws, -1), 0.7, top_p, generator()).bincount(minlength=vocabulary)
    assert not counts[expected == 0].any()
    deviation = (counts / draws - expected).abs() / (expected * (1 - expected) / draws).sqrt().clamp_min(1e-4)
    assert deviation.max() < 5


def test_the_most_probable_token_is_drawn_however_small_the_nucleus() -> None:
    logits = torch.randn(4, 50, generator=generator(1))
    assert torch.equal(nucleus(logits, 1.0, 1e-9, generator()), logits.argmax(-1))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3, tiny_gpt2])
def test_with_a_cache_the_continuations_are_those_without(build: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def some(*, enough: object = lambda tokens: 50 in tokens) -> list[sampling.Sampled]:
        return sampled(
            build(), PROMPT, 9, max_new_tokens=12, ends=set(range(60, 70)), generator=generator(), enough=enough
        )

    with_cache = some()
    with monkeypatch.context() as patched:
        patched.setattr("training.evaluation.prompt_cache._takes_cache", lambda model: False)
        assert some() == with_cache
    lengths = {len(each.tokens) for each in with_cache}
    assert len(lengths) > 2 and max(lengths) <= 12
    assert {each.ended for each in with_cache} == {True, False}
    for each in with_cache:
        assert not {*each.tokens} & {*range(60, 70)}
        assert 50 not in each.tokens[:-1]
        assert each.ended or len(each.tokens) == 12 or each.tokens[-1] == 50


def test_a_seed_means_the_same_continuations_and_another_others() -> None:
    once, again, other = (
        sampled(tiny_llama(), PROMPT, 3, max_new_tokens=8, ends=(), generator=generator(seed)) for seed in (0, 0, 1)
    )
    assert once == again != other


@pytest.mark.parametrize("stopped_after", [1, 7, 19])
def test_a_sampling_that_was_stopped_goes_on_to_the_same_continuations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    model, prompt = tiny_llama(), [5, 6, 7, 8]
    monkeypatch.setattr(sampling, "SECONDS_BETWEEN", 0.0)

    def continued(enough: Callable[[list[int]], bool], unfinished: Unfinished | None) -> list[Sampled]:
        told = {"max_new_tokens": 20, "ends": [9, 30, 31], "enough": enough, "unfinished": unfinished}
        return sampled(model, prompt, 6, generator=generator(3), **told)

    def dies(tokens: list[int]) -> bool:
        if len(tokens) > stopped_after:
            raise KeyboardInterrupt
        return False

    whole = continued(lambda tokens: False, None)
    with pytest.raises(KeyboardInterrupt):
        continued(dies, Unfinished(tmp_path / "round.json", "these"))
    longest = 0

    def counts(tokens: list[int]) -> bool:
        nonlocal longest
        longest = longest or len(tokens)
        return False

    assert continued(counts, Unfinished(tmp_path / "round.json", "these")) == whole
    assert longest == stopped_after + 1, "what was written is not written again"
    assert continued(counts, Unfinished(tmp_path / "round.json", "others")) == whole
