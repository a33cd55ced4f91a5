"""Put a version behind an alias, if its policy allows it: evaluate what is missing, decide, record, move."""

from collections.abc import Sequence
from pathlib import Path

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.evaluate_adapter import evaluate_adapter
from flows.reports import report_table
from flows.suites import default_suites, metrics_of, prepare, suite_named, title
from infra.documents import parse
from infra.errors import GateRefused, InvalidInput, NotFound
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.gate import require_reason
from registry.policy import Policy, SuitePolicy, find_policy
from registry.promotion import Verdict, missing_suites
from registry.records import EvaluationRecord, VersionRecord
from serving.loading import recipe_of
from training.evaluation.suite import of_the_same_answers
from training.evaluation.suite_files import suite_files, suites_called
from training.recipe import Recipe

_DEFAULT_SAMPLES = 100  # fewer held-out items than this decide nothing, unless a policy says so
_DEFAULT_REGRESSION = 0.01


class CheckResult(BaseModel):
    """One line of the policy, held against the numbers."""

    model_config = ConfigDict(frozen=True)

    name: str
    required: str
    measured: str
    passed: bool
    detail: str


class Promotion(BaseModel):
    """A decision about an alias, as it was recorded."""

    model_config = ConfigDict(frozen=True)

    adapter: str
    alias: str
    from_address: str | None
    to_address: str
    decision: str
    moved: bool
    checks: list[CheckResult]


@flow(name="promote-adapter", flow_run_name="promote {address} to {alias}")
def promote_adapter(
    address: str,
    alias: str = "production",
    policy: Policy | None = None,
    force: bool = False,
    reason: str | None = None,
) -> Promotion:
    """Evaluate what the policy asks for and is not measured yet, decide, record the report, move the alias.

    Args:
        address: the candidate, `name@7`.
        alias: what it is to become.
        policy: what is asked. Default: `policies/NAME.yaml`, `policies/default.yaml` (of the working directory, then of
            Regraft's home), else every suite of the candidate's recipe on at least 100 items (all, where there are
            fewer), at most one point worse than the holder.
        force: move the alias whatever the verdict; needs a reason.
        reason: goes into the log.

    Raises:
        InvalidInput: force without a reason, or a policy that asks a suite for a metric which it does not measure.
        Conflict: somebody else moved the alias meanwhile.
    """
    require_reason(force, reason)
    settings = get_settings()
    registry = AdapterRegistry(settings)
    candidate = registry.get(address)
    recipe = recipe_of(candidate)
    asked = spread_over_files(policy or policy_of(candidate, recipe), recipe)
    holder = registry.alias(candidate.adapter, alias)
    holder_address = holder.address if holder else None
    require_measurable(asked, registry.evaluations(candidate.address), recipe)
    _measure_missing(registry, asked, candidate.address, holder_address, recipe)
    verdict = registry.judge(candidate.address, alias, asked)
    try:
        record = registry.promote(candidate.address, alias, verdict, actor=settings.actor, reason=reason, force=force)
        decision, moved = str(record.decision), True
    except GateRefused:
        decision, moved = "refused", False
    promotion = _promotion(candidate, alias, verdict, decision, moved)
    report_table(candidate.adapter, f"promotion to {alias}", [check.model_dump() for check in promotion.checks])
    return promotion


def policy_of(candidate: VersionRecord, recipe: Recipe | None) -> Policy:
    """The policy in force for a version where none is given."""
    for folder in (Path.cwd() / "policies", get_settings().home / "policies"):
        if found := find_policy(candidate.adapter, folder):
            return found
    if recipe is None:
        raise NotFound(
            f"{candidate.address} was imported without a recipe, and there is no policy for '{candidate.adapter}'.",
            f"Write policies/{candidate.adapter}.yaml (see docs/promotion.md), or give one with --policy.",
        )
    lines = [
        SuitePolicy(
            suite=title(suite, recipe),
            metric=suite.metric,
            minimum_samples=min(len(prepare(suite, recipe).examples), _DEFAULT_SAMPLES),
            max_regression=_DEFAULT_REGRESSION,
        )
        for suite in default_suites(recipe)
    ]
    return Policy(suites=tuple(lines))


def spread_over_files(policy: Policy, recipe: Recipe | None) -> Policy:
    """The policy with each line about a suite file, by its name, as lines about that file's suites.

    Raises:
        InvalidInput: a suite that is asked for twice by this.
    """
    own = {title(suite, recipe) for suite in default_suites(recipe)} if recipe else set()
    lines: list[SuitePolicy] = []
    for line in policy.suites:
        if line.suite in own or line.suite not in suite_files():
            lines.append(line)
        else:
            named = [suite.title() for suite in suites_called(line.suite)]
            lines += [line.model_copy(update={"suite": each}) for each in named]
    return parse(Policy, {"suites": [line.model_dump() for line in lines]}, "policy")


def require_measurable(policy: Policy, measured: Sequence[EvaluationRecord], recipe: Recipe | None) -> None:
    """Make sure that each metric which is asked for by name is measured already, or that its suite measures it.

    Raises:
        InvalidInput: a suite does not measure it.
    """
    for line in policy.suites:
        if line.metric is None or any(line.fits(each.suite, each.metric) for each in measured):
            continue
        suite = suite_named(line.suite, recipe)
        found = metrics_of(suite, recipe)
        if line.metric not in found:
            also = suite.metric is not None and of_the_same_answers(suite.metric, [line.metric])
            raise InvalidInput(
                f"The policy asks for {line.metric} of suite '{line.suite}', which measures {', '.join(found)}.",
                f"Write also: [{line.metric}] into the suite, or name one of these." if also else "Name one of these.",
            )


def _measure_missing(
    registry: AdapterRegistry, policy: Policy, candidate: str, holder: str | None, recipe: Recipe | None
) -> None:
    """Candidate first: what the holder lacks depends on the items that the candidate was measured on."""
    for who, address in (("candidate", candidate), ("holder", holder)):
        theirs = registry.evaluations(holder) if holder and holder != candidate else None
        missing = missing_suites(policy, registry.evaluations(candidate), theirs)[who]
        if address and missing:
            suites = dict.fromkeys(suite_named(name, recipe) for name in missing)  # buckets of one suite are one
            evaluate_adapter(address, tuple(suites), items_of=candidate)


def _promotion(candidate: VersionRecord, alias: str, verdict: Verdict, decision: str, moved: bool) -> Promotion:
    return Promotion(
        adapter=candidate.adapter,
        alias=alias,
        from_address=verdict.holder,
        to_address=candidate.address,
        decision=decision,
        moved=moved,
        checks=[
            CheckResult(name=c.name, required=c.required, measured=c.measured, passed=c.passed, detail=c.detail)
            for c in verdict.checks
        ],
    )
