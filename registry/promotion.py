"""The decision about a promotion: a pure function of a policy and of what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infra.sign_flips import sign_flip_test
from registry.policy import Policy, SuitePolicy
from registry.records import EvaluationRecord, as_json


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a verdict: what was asked, what was measured, whether it passed, and why in words."""

    name: str
    required: str
    measured: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a candidate may have the alias, and why.

    `generation` is the alias's when the verdict was reached: the move that follows compares and swaps on it.
    `evaluations` are the ids of the candidate's evaluations that it rests on; `held_out` says that each of them has
    items, and that none was made on the data the candidate was trained on.
    """

    candidate: str
    alias: str
    holder: str | None
    generation: int
    checks: tuple[Check, ...]
    evaluations: tuple[int, ...]
    held_out: bool

    @property
    def passed(self) -> bool:
        """Whether every line passed, and there was one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report that is kept with the promotion."""
        return {"passed": self.passed, **as_json(self)}


def decide(
    policy: Policy,
    *,
    candidate: str,
    alias: str,
    measured: Sequence[EvaluationRecord],
    holder: str | None = None,
    holder_measured: Sequence[EvaluationRecord] = (),
    generation: int = 0,
    trained_on: str | None = None,
) -> Verdict:
    """Judge a candidate line by line.

    Args:
        policy: what is asked.
        candidate: the candidate's address.
        alias: the alias that it would get.
        measured: the candidate's evaluations, newest first.
        holder: address of the alias's current holder, if any.
        holder_measured: the holder's evaluations, newest first.
        generation: the alias's generation; 0 where it has never been set.
        trained_on: fingerprint of the candidate's training data.
    """
    checks: list[Check] = []
    used: list[EvaluationRecord] = []
    for line in policy.suites:
        mine = _newest(measured, line)
        if mine is None:
            checks.append(Check(line.suite, "measured", "nothing", False, "evaluate it first"))
            continue
        used.append(mine)
        checks.extend(_absolute(line, mine, trained_on))
        if holder is not None and holder != candidate:
            theirs = _comparable(holder_measured, line, mine)
            checks.extend(_relative(line, mine, holder, theirs))
    held_out = bool(used) and all(_is_held_out(evaluation, trained_on) for evaluation in used)
    return Verdict(candidate, alias, holder, generation, tuple(checks), tuple(each.id for each in used), held_out)


def missing_suites(
    policy: Policy,
    measured: Sequence[EvaluationRecord],
    holder_measured: Sequence[EvaluationRecord] | None = None,
) -> dict[str, list[str]]:
    """What has to be evaluated before `decide` can: suites for the `candidate`, and for the `holder`.

    The holder lacks a suite when it has no number on the very items that the candidate was measured on. Where the
    candidate itself has to be measured first, the holder is asked for any number of that suite; ask again afterwards.
    """
    missing: dict[str, list[str]] = {"candidate": [], "holder": []}
    for line in policy.suites:
        mine = _newest(measured, line)
        if mine is None or mine.samples < line.minimum_samples:
            missing["candidate"].append(line.suite)
        if holder_measured is None or (line.max_regression is None and line.significance is None):
            continue
        theirs = _comparable(holder_measured, line, mine) if mine else _newest(holder_measured, line)
        if theirs is None:
            missing["holder"].append(line.suite)
    return {who: list(dict.fromkeys(suites)) for who, suites in missing.items()}


def mcnemar(candidate: Sequence[int], holder: Sequence[int]) -> float:
    """One-sided exact McNemar test: p-value of "the candidate is no better", from 0/1 outcomes on the same items.

    p = P(X ≥ b), X ~ Binomial(b + c, ½), b items right only for the candidate, c only for the holder (McNemar 1947).
    """
    from scipy.stats import binomtest

    b = sum(1 for mine, theirs in zip(candidate, holder, strict=True) if mine > theirs)
    c = sum(1 for mine, theirs in zip(candidate, holder, strict=True) if mine < theirs)
    return float(binomtest(b, b + c, 0.5, alternative="greater").pvalue) if b + c else 1.0


def _absolute(line: SuitePolicy, mine: EvaluationRecord, trained_on: str | None) -> list[Check]:
    name = f"{mine.suite} {mine.metric}"
    interval = f" [{mine.low:.4g}–{mine.high:.4g}]" if mine.low is not None and mine.high is not None else ""
    shown = f"{mine.value:.4g}{interval}"
    checks = [
        Check(
            f"{name}: samples", f"≥ {line.minimum_samples:,}", f"{mine.samples:,}", mine.samples >= line.minimum_samples
        )
    ]
    if not _is_held_out(mine, trained_on):
        checks.append(Check(f"{name}: held out", "other data than it was trained on", "not", False))
    if line.minimum is not None:
        checks.append(Check(name, f"≥ {line.minimum:.4g}", shown, mine.value >= line.minimum))
    if line.maximum is not None:
        checks.append(Check(name, f"≤ {line.maximum:.4g}", shown, mine.value <= line.maximum))
    return checks


def _relative(line: SuitePolicy, mine: EvaluationRecord, holder: str, theirs: EvaluationRecord | None) -> list[Check]:
    name = f"{mine.suite} {mine.metric} against {holder}"
    asked = line.max_regression is not None or line.significance is not None
    if theirs is None:
        why = "the holder has no number on the same items; evaluate it first"
        return [Check(name, "comparable", "nothing", False, why)] if asked else []
    checks = []
    loss = (theirs.value - mine.value) * (1 if line.improves_upwards(mine.metric) else -1)
    if line.max_regression is not None:
        passed, required, shown = (
            loss <= line.max_regression + 1e-12,
            f"loss ≤ {line.max_regression:.4g}",
            f"{loss:+.4g}",
        )
        detail = f"{mine.value:.4g} against {theirs.value:.4g}"
        if line.regression_significance is not None:
            required += f", or p > {line.regression_significance:.4g}"
            p = None if passed else _loss_by_chance(line, mine, theirs)
            if p is not None:
                passed, shown = p > line.regression_significance, f"{loss:+.4g}, p = {p:.3g}"
            elif not passed:
                detail += ", no scores item by item for both versions"
        checks.append(Check(name, required, shown, passed, detail))
    if line.significance is not None:
        required = f"better, p ≤ {line.significance:.4g}"
        found = _gain_by_chance(line, mine, theirs)
        if found is None:
            checks.append(Check(name, required, "nothing", False, "no outcomes item by item for both versions"))
        else:
            p, test = found
            checks.append(Check(name, required, f"p = {p:.3g}", p <= line.significance, f"one-sided {test}"))
    return checks


def _gain_by_chance(line: SuitePolicy, mine: EvaluationRecord, theirs: EvaluationRecord) -> tuple[float, str] | None:
    """p-value of "the candidate is no better", and by which test; None without the same items of both."""
    if mine.outcomes is not None and theirs.outcomes is not None and len(mine.outcomes) == len(theirs.outcomes):
        return mcnemar(mine.outcomes, theirs.outcomes), "exact McNemar test"
    gains = _gains(line, mine, theirs)
    return (sign_flip_test(gains, one_sided=True), "sign-flip test") if gains is not None else None


def _loss_by_chance(line: SuitePolicy, mine: EvaluationRecord, theirs: EvaluationRecord) -> float | None:
    """p-value of "the candidate loses no more than is allowed"; None without the same items of both."""
    gains, allowed = _gains(line, mine, theirs), line.max_regression or 0.0
    return None if gains is None else sign_flip_test([-gain - allowed for gain in gains], one_sided=True)


def _gains(line: SuitePolicy, mine: EvaluationRecord, theirs: EvaluationRecord) -> list[float] | None:
    """How much better the candidate is on each item, by scores or outcomes."""
    a, b = mine.scores or mine.outcomes, theirs.scores or theirs.outcomes
    if a is None or b is None or len(a) != len(b):
        return None
    sign = 1 if line.improves_upwards(mine.metric) else -1
    return [sign * (x - y) for x, y in zip(a, b, strict=True)]


def _newest(measured: Sequence[EvaluationRecord], line: SuitePolicy) -> EvaluationRecord | None:
    fitting = [each for each in measured if line.fits(each.suite, each.metric)]
    enough = [each for each in fitting if each.samples >= line.minimum_samples]
    return next(iter(enough or fitting), None)


def _comparable(
    measured: Sequence[EvaluationRecord], line: SuitePolicy, mine: EvaluationRecord
) -> EvaluationRecord | None:
    """The newest evaluation on the very items of `mine`."""
    same = [
        each
        for each in measured
        if each.metric == mine.metric and each.dataset_fingerprint == mine.dataset_fingerprint is not None
    ]
    return _newest(same, line)


def _is_held_out(evaluation: EvaluationRecord, trained_on: str | None) -> bool:
    fingerprint = evaluation.dataset_fingerprint
    return evaluation.samples > 0 and fingerprint is not None and fingerprint != trained_on
