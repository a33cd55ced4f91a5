"""How near a written answer comes to its reference: ROUGE, BLEU, chrF, BERTScore, token F1; all as shares 0–1."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from infra.settings import get_settings
from training.base_models import resolve_base
from training.device import best_device
from training.gguf_conversion import without_loading_bars
from training.selection.embedding import MINILM

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class TextScores:
    """One metric of N answers.

    Attributes:
        of_items: N scores; an empty answer has 0.
        components: for BLEU and chrF, N rows of n-gram counts, whose sum `corpus_score` turns into the score of all
            answers together; else empty, and the score of all answers is the mean of `of_items`.
    """

    of_items: tuple[float, ...]
    components: tuple[tuple[int, ...], ...] = ()


def text_scores(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
    """Score N answers, each against one or more references.

    - `rouge1`, `rouge2`, `rougeL` (Lin 2004): F-measure of `rouge_score` with its stemmer, the best of the references.
      Its words are runs of a–z and 0–9, so of other scripts it sees nothing.
    - `bleu` (Papineni et al. 2002), `chrf` (Popović 2015): `sacrebleu`, in words and in characters; an item's BLEU is
      over as many orders of n-grams as it has (`effective_order`).
    - `bertscore` (Zhang et al. 2020, arXiv:1904.09675): F1 of `bert_score` without rescaling, by the last layer of
      the MiniLM encoder; the best of the references. Texts are cut at 512 tokens.
    - `token_f1` (SQuAD, Rajpurkar et al. 2016): overlap of bags of words in lower case, without punctuation and
      articles; the best of the references.

    Raises:
        NotFound: the encoder of BERTScore is not installed.
    """
    if metric in ("bleu", "chrf"):
        return _sacrebleu_scores(metric, answers, references)
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]
    if metric == "bertscore":
        score = _bert_scores
    elif metric == "token_f1":
        score = _token_f1s
    else:
        score = partial(_rouge_scores, metric)
    written = [place for place, answer in enumerate(answers) if answer.strip()]
    found = score([answers[place] for place in written], [references[place] for place in written]) if written else []
    scores = [0.0] * len(answers)
    for place, value in zip(written, found, strict=True):
        scores[place] = value
    return TextScores(tuple(scores))


def corpus_score(metric: str, components: Sequence[float]) -> float:
    """BLEU or chrF of a corpus from the sum of its items' components: sacrebleu's `corpus_score` / 100."""
    return float(_sacrebleu(metric)._compute_score_from_stats([int(count) for count in components]).score) / 100


def _sacrebleu_scores(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
    """Counts item by item, as sacrebleu itself takes them for its significance tests."""
    of_item = _sacrebleu(metric, of_item=True)
    scores, components = [], []
    for answer, wanted in zip(answers, references, strict=True):
        counts = of_item._extract_corpus_statistics([answer], [[reference] for reference in wanted])
        scores.append(float(of_item._aggregate_and_compute(counts).score) / 100)
        components.append(tuple(map(int, counts[0])))
    return TextScores(tuple(scores), tuple(components))


@lru_cache
def _sacrebleu(metric: str, of_item: bool = False) -> Any:
    """`force` only silences a warning about answers that end in ' .'."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(effective_order=of_item, force=True) if metric == "bleu" else CHRF()


def _rouge_scores(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([metric], use_stemmer=True)
    return [
        float(scorer.score_multi(list(wanted), answer)[metric].fmeasure)
        for answer, wanted in zip(answers, references, strict=True)
    ]


def _bert_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    _, _, f1 = _bert_scorer().score(list(answers), [list(wanted) for wanted in references])
    return [min(1.0, max(0.0, float(value))) for value in f1]  # a cosine may be a hair above 1, or below 0


@lru_cache
def _bert_scorer() -> Any:
    from bert_score import BERTScorer
    from transformers import AutoConfig

    folder = str(resolve_base(MINILM, get_settings().base_models).directory)
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    with without_loading_bars():
        return BERTScorer(model_type=folder, num_layers=layers, device=str(best_device()))


def _token_f1s(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    return [
        max(_token_f1(answer, reference) for reference in wanted)
        for answer, wanted in zip(answers, references, strict=True)
    ]


def _token_f1(answer: str, reference: str) -> float:
    """2PR/(P + R) over bags of words; where one of the two has no words left, whether the other has none either."""
    ours, theirs = _words(answer), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
