"""From items to the number of them all, for any choice of items: what a bootstrap resamples."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from training.evaluation.calibration import CALIBRATION_ERRORS, calibration_error
from training.evaluation.statistics import perplexity
from training.evaluation.text_metrics import corpus_score

Statistic = Callable[[NDArray[np.int64]], float]


def statistic_of(metric: str, scores: Sequence[float], components: Sequence[Sequence[float]]) -> Statistic:
    """The metric's value over the items at the places that it is given; a place that is named twice counts twice.

    Args:
        metric: what was measured.
        scores: a number for each item, of which the value is the mean; not looked at where there are components.
        components: for each item, what a value over all items is computed from and no mean: n-gram counts of bleu and
            chrf, (confidence, right) of a calibration error, (nats, tokens) of perplexity.
    """
    rows = np.asarray(components, dtype=np.float64)
    if metric in ("bleu", "chrf"):
        return lambda places: corpus_score(metric, rows[places].sum(axis=0).tolist())
    if metric in CALIBRATION_ERRORS:
        mass = metric == "ece_equal_mass"
        return lambda places: calibration_error(rows[places, 0].tolist(), rows[places, 1].tolist(), equal_mass=mass)
    if metric == "perplexity":
        return lambda places: perplexity(*rows[places].sum(axis=0).tolist())
    of_items = np.asarray(scores, dtype=np.float64)
    return lambda places: float(of_items[places].mean())
