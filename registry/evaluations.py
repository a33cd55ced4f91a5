"""Measured numbers of versions, each with its uncertainty."""

import logging
import math
import re
from collections.abc import Sequence
from typing import TypedDict

from sqlalchemy import select
from sqlalchemy.orm import Session

from infra.errors import InvalidInput, ServiceUnavailable
from registry.models import Evaluation, Version
from registry.records import EvaluationRecord
from registry.tracking import Tracking

logger = logging.getLogger(__name__)


class Details(TypedDict, total=False):
    """What may be said of a measured number.

    Attributes:
        unit: of the value and its bounds, as `share` or `nats`.
        low: lower bound of the interval.
        high: upper bound of the interval.
        stderr: standard error.
        dataset_fingerprint: of the items; only numbers on the same items are ever compared.
        outcomes: 0 or 1 for each item, in the items' order; a paired test needs them.
        scores: a number for each item, whose mean is the value; a paired test needs them.
        components: for each item, numbers that a value which is no mean is computed from.
        flow_run_id: the flow run that measured it.
    """

    unit: str | None
    low: float | None
    high: float | None
    stderr: float | None
    dataset_fingerprint: str | None
    outcomes: Sequence[int] | None
    scores: Sequence[float] | None
    components: Sequence[Sequence[float]] | None
    flow_run_id: str | None


def record(
    session: Session, version: Version, suite: str, metric: str, value: float, samples: int, details: Details
) -> Evaluation:
    """Add an evaluation.

    Raises:
        InvalidInput: a number that is not finite, bounds out of order, or items that do not fit the samples.
    """
    what = f"{suite}/{metric} of {version.address}"
    low, high, outcomes = details.get("low"), details.get("high"), details.get("outcomes")
    for name, number in {"value": value, "low": low, "high": high, "stderr": details.get("stderr")}.items():
        if number is not None and not math.isfinite(number):
            raise InvalidInput(f"{what}: {name} is {number}, not a number to decide by.")
    if samples < 0 or (low is not None and high is not None and low > high):
        raise InvalidInput(f"{what}: {samples} samples, interval [{low}, {high}].")
    if outcomes is not None and (len(outcomes) != samples or not set(outcomes) <= {0, 1}):
        raise InvalidInput(f"{what}: outcomes must be 0 or 1 for each of the {samples} items.")
    scores, components = details.get("scores"), details.get("components")
    for name, rows in {"scores": [scores or ()], "components": components or ()}.items():
        if not all(math.isfinite(number) for numbers in rows for number in numbers):
            raise InvalidInput(f"{what}: {name} must be numbers, not NaN or infinity.")
    if any(items is not None and len(items) != samples for items in (scores, components)):
        raise InvalidInput(f"{what}: scores and components must be there for each of the {samples} items.")
    row = Evaluation(
        version=version,
        suite=suite,
        metric=metric,
        value=float(value),
        samples=samples,
        unit=details.get("unit"),
        stderr=details.get("stderr"),
        low=low,
        high=high,
        dataset_fingerprint=details.get("dataset_fingerprint"),
        outcomes=[int(outcome) for outcome in outcomes] if outcomes is not None else None,
        scores=[float(score) for score in scores] if scores is not None else None,
        components=[[float(number) for number in numbers] for numbers in components]
        if components is not None
        else None,
        flow_run_id=details.get("flow_run_id"),
    )
    session.add(row)
    session.flush()
    return row


def of_version(session: Session, version: Version) -> list[EvaluationRecord]:
    """All evaluations of a version, newest first."""
    query = select(Evaluation).where(Evaluation.version_id == version.id).order_by(Evaluation.id.desc())
    return [EvaluationRecord.of(row) for row in session.scalars(query).unique()]


def show_in_mlflow(tracking: Tracking, run_id: str, evaluation: EvaluationRecord) -> None:
    """Log the number to the version's run. The registry keeps it; MLflow only shows it, so its silence is a warning."""
    name = re.sub(r"[^\w\-. :/]", "_", f"{evaluation.suite}/{evaluation.metric}")  # the characters MLflow allows
    try:
        tracking.log_metrics(run_id, {name: evaluation.value})
    except ServiceUnavailable as error:
        logger.warning("%s of %s is not shown in MLflow: %s", name, evaluation.address, error.what)
