import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from infra.errors import Conflict, GateRefused, InvalidInput, NotFound
from registry import AdapterRegistry
from registry.models import Decision
from registry.policy import Policy, SuitePolicy, find_policy
from registry.promotion import Verdict, decide, mcnemar, missing_suites
from registry.records import DatasetRecord, EvaluationRecord

Register = Callable[..., str]
Evaluate = Callable[..., int]


def measured(value: float, **changes: object) -> EvaluationRecord:
    fields: dict[str, object] = {
        "id": 1, "address": "counting@2", "suite": "counting", "metric": "accuracy", "value": value, "unit": None,
        "stderr": None, "low": None, "high": None, "samples": 200, "dataset_fingerprint": "t" * 64, "outcomes": None,
        "flow_run_id": None, "at": None,
    }  # fmt: skip
    return EvaluationRecord(**{**fields, **changes})  # type: ignore[arg-type]


def judged(line: dict[str, object], mine: EvaluationRecord, theirs: EvaluationRecord | None = None) -> Verdict:
    return decide(
        Policy(suites=(SuitePolicy(suite="counting", **line),)),
        candidate="counting@2",
        alias="production",
        measured=[mine],
        holder="counting@1" if theirs else None,
        holder_measured=[theirs] if theirs else (),
    )


# ---- policy


def test_a_policy_reads_from_yaml_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "counting.yaml"
    path.write_text(
        "defaults: {minimum_samples: 200, significance: 0.05}\n"
        "suites:\n  - {suite: counting, minimum: 0.6}\n  - {suite: sorting, significance: null}\n"
    )
    counting, sorting = Policy.load(path).suites
    assert (counting.minimum, counting.minimum_samples, counting.significance) == (0.6, 200, 0.05)
    assert (sorting.minimum, sorting.minimum_samples, sorting.significance) == (None, 200, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("suites: [{suite: a, minimun: 0.6}]", "Did you mean 'minimum'?"),
        ("defaults: {minimun: 0.6}\nsuites: [{suite: a}]", "Did you mean 'minimum'?"),
        ("suites: []", "suites is empty."),
        ("suits: [{suite: a}]", "Did you mean 'suites'?"),
        ("suites: [{suite: b}, {suite: a, significance: 2}]", "suites[1].significance"),
        ("suites: [{suite: a, minimum: .nan}]", "minimum"),
        ("suites: [{suite: a}, {suite: a}]", "decided twice: a"),
        ("suites: [{suite: a}", "not valid YAML"),
    ],
)
def test_a_policy_with_a_mistake_is_refused_and_explained(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "counting.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput) as refused:
        Policy.load(path)
    assert said in str(refused.value) and "counting.yaml" in str(refused.value)
    assert "should have at least" not in str(refused.value)  # what only follows is not told


def test_an_adapters_own_policy_comes_before_the_default(tmp_path: Path) -> None:
    assert find_policy("counting", tmp_path) is None
    (tmp_path / "default.yaml").write_text("suites: [{suite: general}]")
    (tmp_path / "counting.yaml").write_text("suites: [{suite: counting}]")
    assert [find_policy(name, tmp_path).suites[0].suite for name in ("counting", "sorting")] == ["counting", "general"]


# ---- decision


@hypothesis_settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_mcnemar_is_the_binomial_tail(b: int, c: int, both: int) -> None:
    candidate = [1] * b + [0] * c + [1] * both
    holder = [0] * b + [1] * c + [1] * both
    tail = sum(comb(b + c, k) for k in range(b, b + c + 1)) / 2 ** (b + c)
    assert mcnemar(candidate, holder) == pytest.approx(tail)


@pytest.mark.parametrize(
    ("line", "mine", "theirs", "passed"),
    [
        ({"minimum": 0.6}, measured(0.6), None, True),
        ({"minimum": 0.6}, measured(0.599), None, False),
        ({"maximum": 9.0, "metric": "accuracy"}, measured(9.1), None, False),
        ({"minimum_samples": 201}, measured(0.9), None, False),
        ({}, measured(0.9, samples=0), None, False),
        ({}, measured(0.9, dataset_fingerprint=None), None, False),
        ({"max_regression": 0.01}, measured(0.59), measured(0.60), True),
        ({"max_regression": 0.01}, measured(0.58), measured(0.60), False),
        ({"max_regression": 0.0}, measured(0.60), measured(0.60), True),
        ({"max_regression": None}, measured(0.1), measured(0.60), True),
        ({"max_regression": 1.0, "higher_is_better": False}, measured(11.0), measured(10.0), True),
        ({"max_regression": 1.0, "higher_is_better": False}, measured(11.1), measured(10.0), False),
        ({"max_regression": 1.0, "higher_is_better": False}, measured(5.0), measured(10.0), True),
        ({}, measured(0.9), measured(0.5, dataset_fingerprint="u" * 64), False),
        ({}, measured(0.9), measured(0.5, suite="other"), False),
        ({"significance": 0.05}, measured(1.0, outcomes=(1,) * 5), measured(0.0, outcomes=(0,) * 5), True),
        ({"significance": 0.05}, measured(1.0, outcomes=(1,) * 4), measured(0.0, outcomes=(0,) * 4), False),
        ({"significance": 0.05}, measured(1.0, outcomes=(1,) * 9), measured(1.0, outcomes=(1,) * 9), False),
        ({"significance": 0.05}, measured(1.0), measured(0.0), False),
        ({"significance": 0.05}, measured(1.0), None, True),
    ],
)
def test_a_line_decides(
    line: dict[str, object], mine: EvaluationRecord, theirs: EvaluationRecord | None, passed: bool
) -> None:
    assert judged(line, mine, theirs).passed is passed


BUCKETS = ("summaries/test[0-512]", "summaries/test[512-1024]")


def in_each_bucket(short: list[float], long: list[float]) -> list[EvaluationRecord]:
    """ROUGE-L of a version in two buckets, item by item."""
    return [
        measured(
            sum(scores) / len(scores), suite=suite, metric="rougeL", scores=tuple(scores), samples=len(scores),
            dataset_fingerprint=suite[-10:].rjust(64, "0"),
        )
        for suite, scores in zip(BUCKETS, (short, long), strict=True)
    ]  # fmt: skip


def gate_over_buckets(candidate: list[EvaluationRecord], holder: list[EvaluationRecord], **line: object) -> Verdict:
    return decide(
        Policy(suites=tuple(SuitePolicy(suite=suite, metric="rougeL", **line) for suite in BUCKETS)),
        candidate="counting@2",
        alias="production",
        measured=candidate,
        holder="counting@1",
        holder_measured=holder,
    )


@pytest.mark.parametrize("line", [{"max_regression": 0.02}, {"max_regression": 0.02, "regression_significance": 0.05}])
def test_a_candidate_that_loses_the_long_bucket_is_refused_and_one_that_wins_in_all_is_not(
    line: dict[str, object],
) -> None:
    generator = np.random.default_rng(0)
    short, long = generator.uniform(0.3, 0.5, 80), generator.uniform(0.2, 0.4, 80)
    holder = in_each_bucket(short.tolist(), long.tolist())

    def candidate(on_short: float, on_long: float) -> list[EvaluationRecord]:
        return in_each_bucket(
            *((s + generator.normal(gain, 0.02, 80)).tolist() for s, gain in ((short, on_short), (long, on_long)))
        )

    a, b = candidate(+0.15, -0.08), candidate(+0.05, +0.05)
    assert sum(each.value for each in a) > sum(each.value for each in holder)  # on the whole A is the better one
    refused = gate_over_buckets(a, holder, **line)
    failed = [check.name for check in refused.checks if not check.passed]
    assert failed == ["summaries/test[512-1024] rougeL against counting@1"]
    assert gate_over_buckets(b, holder, **line).passed


def test_equal_versions_pass_a_tested_regression_as_often_as_its_level_says() -> None:
    """Two draws of one model: with α = 0.05 a line refuses at most about 5 %, untested about half."""
    generator = np.random.default_rng(2)
    passed, untested = 0, 0
    for _ in range(200):
        hardness = generator.uniform(0.2, 0.6, 40)
        mine, theirs = (
            measured(float(np.mean(s)), metric="rougeL", scores=tuple(s), samples=40)
            for s in (hardness + generator.normal(0, 0.1, 40) for _ in range(2))
        )
        passed += judged({"regression_significance": 0.05}, mine, theirs).passed
        untested += judged({}, mine, theirs).passed
    assert passed >= 184  # of 200 at 95 %: 190 ± 3.1
    assert untested < 130


@pytest.mark.parametrize(
    ("line", "mine", "theirs", "passed"),
    [
        ({"regression_significance": 0.05}, {"outcomes": (0,) * 3 + (1,) * 97}, {"outcomes": (1,) * 100}, True),
        ({"regression_significance": 0.05}, {"outcomes": (0,) * 30 + (1,) * 70}, {"outcomes": (1,) * 100}, False),
        (
            {"regression_significance": 0.05, "max_regression": 0.4},
            {"outcomes": (0,) * 30 + (1,) * 70},
            {"outcomes": (1,) * 100},
            True,
        ),
        ({"regression_significance": 0.05}, {}, {}, False),
        ({"significance": 0.05}, {"scores": (0.9, 0.8) * 20}, {"scores": (0.5, 0.6) * 20}, True),
        ({"significance": 0.05}, {"scores": (0.5, 0.6) * 20}, {"scores": (0.5, 0.6) * 20}, False),
        (
            {"significance": 0.05, "higher_is_better": False},
            {"scores": (0.9, 0.8) * 20},
            {"scores": (0.5, 0.6) * 20},
            False,
        ),
    ],
)  # fmt: skip
def test_a_line_tests_what_it_is_asked_to(
    line: dict[str, object], mine: dict[str, tuple[float, ...]], theirs: dict[str, tuple[float, ...]], passed: bool
) -> None:
    def record(items: dict[str, tuple[float, ...]], otherwise: float) -> EvaluationRecord:
        (scores,) = items.values() or ((otherwise,),)
        return measured(sum(scores) / len(scores), **items)

    verdict = judged(
        {"max_regression": 0.0 if "regression_significance" in line else None, **line},
        record(mine, 0.4),
        record(theirs, 0.5),
    )
    assert verdict.passed is passed


@pytest.mark.parametrize("line", [{"significance": 0.05}, {"regression_significance": 0.05}])
def test_few_items_of_a_text_metric_prove_neither_a_gain_nor_a_loss(line: dict[str, object]) -> None:
    gained = "significance" in line
    for items in (1, 4):
        mine = measured(0.45 if gained else 0.35, metric="rougeL", scores=(0.45 if gained else 0.35,) * items)
        verdict = judged(
            {"max_regression": None if gained else 0.0, **line},
            mine,
            measured(0.4, metric="rougeL", scores=(0.4,) * items),
        )
        assert verdict.passed is not gained, verdict


def test_a_loss_beyond_the_margin_is_tested_as_the_t_test_does() -> None:
    from scipy.stats import ttest_1samp

    holder = np.random.default_rng(4).uniform(0.3, 0.6, 400)
    noise = np.random.default_rng(5).normal(0, 0.2, 400)
    for loss in (0.015, 0.02, 0.03):
        mine = holder - loss - noise + noise.mean()
        a, b = (measured(float(s.mean()), metric="rougeL", scores=tuple(s), samples=400) for s in (mine, holder))
        check = judged({"max_regression": 0.01, "regression_significance": 0.05}, a, b).checks[-1]
        wanted = ttest_1samp(holder - mine, 0.01, alternative="greater").pvalue
        assert float(check.measured.partition("p = ")[2]) == pytest.approx(wanted, abs=0.02)


def test_without_a_metric_the_suites_own_number_decides_and_not_what_was_measured_beside_it() -> None:
    newest_first = [measured(0.1, id=3, metric="brier"), measured(0.7, id=2), measured(0.05, id=1, metric="ece")]
    policy = Policy(suites=(SuitePolicy(suite="counting", minimum=0.6),))
    assert decide(policy, candidate="c@1", alias="production", measured=newest_first).passed
    by_name = Policy(suites=(SuitePolicy(suite="counting", metric="ece", maximum=0.02),))
    assert not decide(by_name, candidate="c@1", alias="production", measured=newest_first).passed
    calibration = judged({"metric": "ece"}, measured(0.05, metric="ece"), measured(0.10, metric="ece"))
    assert calibration.passed  # lower is better


def test_how_near_programs_are_decides_only_where_it_is_named() -> None:
    newest_first = [measured(0.7, metric="pass@1", id=2), measured(0.1, metric="parses", id=1)]
    policy = Policy(suites=(SuitePolicy(suite="counting", minimum=0.6),))
    verdict = decide(policy, candidate="c@1", alias="production", measured=newest_first)
    assert verdict.passed and verdict.evaluations == (2,)
    alone = decide(policy, candidate="c@1", alias="production", measured=newest_first[1:])
    assert not alone.passed and alone.evaluations == ()
    by_name = Policy(suites=(SuitePolicy(suite="counting", metric="parses", minimum=0.6),))
    assert not decide(by_name, candidate="c@1", alias="production", measured=newest_first).passed


def test_what_was_not_measured_does_not_pass() -> None:
    assert not judged({"metric": "f1"}, measured(1.0)).passed


def test_the_training_data_are_no_held_out_set() -> None:
    policy = Policy(suites=(SuitePolicy(suite="counting"),))
    verdict = decide(policy, candidate="c@1", alias="production", measured=[measured(1.0)], trained_on="t" * 64)
    assert not verdict.passed and not verdict.held_out


def test_the_newest_number_counts() -> None:
    policy = Policy(suites=(SuitePolicy(suite="counting", minimum=0.6),))
    newest_first = [measured(0.7, id=2), measured(0.1, id=1)]
    verdict = decide(policy, candidate="c@1", alias="production", measured=newest_first)
    assert verdict.passed and verdict.evaluations == (2,)


def test_a_report_says_what_was_asked_and_measured() -> None:
    report = judged({"minimum": 0.6}, measured(0.12, low=0.08, high=0.17), measured(0.74)).to_json()
    assert report["passed"] is False
    lines = [(check["required"], check["measured"], check["passed"]) for check in report["checks"]]
    assert lines == [("≥ 1", "200", True), ("≥ 0.6", "0.12 [0.08–0.17]", False), ("loss ≤ 0", "+0.62", False)]


def test_missing_suites_are_listed_for_both_sides() -> None:
    policy = Policy(suites=(SuitePolicy(suite="counting"), SuitePolicy(suite="sorting", max_regression=None)))
    assert missing_suites(policy, []) == {"candidate": ["counting", "sorting"], "holder": []}
    assert missing_suites(policy, [], []) == {"candidate": ["counting", "sorting"], "holder": ["counting"]}
    other_items = [measured(0.5, dataset_fingerprint="u" * 64)]
    assert missing_suites(policy, [measured(1.0)], other_items) == {"candidate": ["sorting"], "holder": ["counting"]}
    assert missing_suites(policy, [measured(1.0), measured(1.0, suite="sorting")], [measured(0.5)]) == {
        "candidate": [],
        "holder": [],
    }


# ---- the gate


POLICY = Policy(suites=(SuitePolicy(suite="counting", minimum=0.6, minimum_samples=4),))
GOOD, BETTER, BAD = [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]


def promote(registry: AdapterRegistry, address: str, alias: str = "production", policy: Policy = POLICY) -> None:
    registry.promote(address, alias, registry.judge(address, alias, policy), actor="ada")


@pytest.fixture
def good(register: Register, evaluate: Evaluate) -> Callable[..., str]:
    """Registers a version that passes the policy."""

    def make(outcomes: list[int] = GOOD, **changes: object) -> str:
        address = register(**changes)
        evaluate(address, outcomes)
        return address

    return make


def in_mlflow(registry: AdapterRegistry, alias: str = "production") -> int | None:
    return registry.tracking.aliases("counting").get(alias)


def test_a_passing_version_gets_the_alias_here_and_in_mlflow(registry: AdapterRegistry, good: Register) -> None:
    address = good()
    record = registry.promote(address, "production", registry.judge(address, "production", POLICY), actor="ada")
    assert (record.decision, record.from_address, record.to_address, record.generation) == (
        Decision.PROMOTED, None, address, 1,
    )  # fmt: skip
    assert registry.alias("counting", "production").address == address
    assert in_mlflow(registry) == registry.get(address).mlflow_version
    assert registry.history("counting") == [record]
    assert record.report["checks"] and record.actor == "ada"
    assert registry.fsck() == []


def test_a_refusal_is_recorded_and_moves_nothing(registry: AdapterRegistry, good: Register) -> None:
    first, bad = good(), good(BAD)
    promote(registry, first)
    with pytest.raises(GateRefused, match=r"0\.25, wanted ≥ 0\.6"):
        promote(registry, bad)
    refused, _ = registry.history("counting")
    assert (refused.decision, refused.from_address, refused.to_address, refused.generation) == (
        Decision.REFUSED, first, bad, 1,
    )  # fmt: skip
    assert refused.report["passed"] is False
    assert registry.alias("counting", "production").address == first


def test_a_protected_alias_wants_held_out_items(
    registry: AdapterRegistry, register: Register, evaluate: Evaluate
) -> None:
    trained_on = DatasetRecord("generated", "d" * 64, 4, {})
    address = register(dataset=trained_on)
    evaluate(address, GOOD, fingerprint="d" * 64)
    forged = Verdict(address, "production", None, 0, judged({}, measured(1.0)).checks, (1,), True)
    for verdict in (forged, Verdict(address, "production", None, 0, forged.checks, (), True)):
        with pytest.raises(GateRefused, match="held-out"):
            registry.promote(address, "production", verdict, actor="eve")
    with pytest.raises(GateRefused):
        promote(registry, address)
    assert registry.alias("counting", "production") is None
    assert [line.decision for line in registry.history("counting")] == [Decision.REFUSED] * 3


def test_a_verdict_about_another_version_is_worthless(registry: AdapterRegistry, good: Register) -> None:
    first, second = good(), good()
    verdict = registry.judge(first, "production", POLICY)
    with pytest.raises(InvalidInput, match=second):
        registry.promote(second, "production", verdict, actor="eve")
    with pytest.raises(InvalidInput, match="challenger"):
        registry.promote(first, "challenger", verdict, actor="eve")


def test_force_needs_a_reason_and_is_recorded_with_it(registry: AdapterRegistry, good: Register) -> None:
    bad = good(BAD)
    verdict = registry.judge(bad, "production", POLICY)
    for reason in (None, "", "  "):
        with pytest.raises(InvalidInput, match="reason"):
            registry.promote(bad, "production", verdict, actor="ada", force=True, reason=reason)
    record = registry.promote(bad, "production", verdict, actor="ada", force=True, reason="hotfix")
    assert (record.decision, record.reason, record.report["passed"]) == (Decision.FORCED, "hotfix", False)


def test_without_verdict_or_force_nothing_is_promoted(registry: AdapterRegistry, good: Register) -> None:
    with pytest.raises(InvalidInput, match="without a verdict"):
        registry.promote(good(), "production", None, actor="ada")


def test_a_protected_alias_is_not_set_by_hand(registry: AdapterRegistry, good: Register) -> None:
    address = good()
    with pytest.raises(GateRefused, match="protected"):
        registry.set_alias(address, "production", actor="ada")
    registry.set_alias(address, "challenger", actor="ada")
    assert registry.get("counting@challenger").address == address
    assert registry.history("counting")[0].decision == Decision.MOVED


def test_promote_refuses_when_the_holder_moved(registry: AdapterRegistry, good: Register) -> None:
    first, second = good(), good()
    late = registry.judge(second, "production", POLICY)
    promote(registry, first)
    with pytest.raises(Conflict, match=f"now {first}"):
        registry.promote(second, "production", late, actor="bob")
    with pytest.raises(Conflict, match=f"now {first}"):
        registry.promote(second, "production", None, actor="bob", force=True, reason="x", expected_generation=0)
    assert len(registry.history("counting")) == 1


def test_of_promoters_at_once_exactly_one_wins(registry: AdapterRegistry, good: Register) -> None:
    addresses = [good() for _ in range(4)]
    verdicts = [registry.judge(address, "production", POLICY) for address in addresses]
    together = threading.Barrier(4)

    def run(verdict: Verdict) -> str | None:
        mine = AdapterRegistry(registry.settings)
        mine.adapters()
        mine.tracking.aliases("counting")
        together.wait()
        try:
            return mine.promote(verdict.candidate, "production", verdict, actor=verdict.candidate).to_address
        except Conflict as lost:
            return None if "is now counting@" in lost.what else "wrong message"

    with ThreadPoolExecutor(4) as pool:
        winners = [winner for winner in pool.map(run, verdicts) if winner]
    assert len(winners) == 1
    assert registry.alias("counting", "production").address == winners[0]
    assert in_mlflow(registry) == registry.get(winners[0]).mlflow_version
    assert len(registry.history("counting")) == 1
    assert registry.fsck() == []


def test_mlflow_ends_with_the_deciding_holder_whatever_the_order_of_the_mirrors(
    registry: AdapterRegistry, good: Register
) -> None:
    addresses = [good() for _ in range(6)]

    def run(address: str) -> None:
        AdapterRegistry(registry.settings).set_alias(address, "challenger", actor="ada")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, addresses))
    assert in_mlflow(registry, "challenger") == registry.get("counting@challenger").mlflow_version
    assert registry.alias("counting", "challenger").generation == 6
    assert registry.fsck() == []


def test_rollback_goes_back_step_by_step_and_loses_no_history(registry: AdapterRegistry, good: Register) -> None:
    first, second, third = good(), good(GOOD), good(BETTER)
    for address in (first, second, third):
        promote(registry, address)
    assert registry.rollback("counting", actor="ada", reason="wrong answers").to_address == second
    assert registry.rollback("counting", actor="ada").to_address == first
    with pytest.raises(NotFound, match="no earlier holder"):
        registry.rollback("counting", actor="ada")
    promote(registry, third)
    assert registry.rollback("counting", actor="ada").to_address == first
    decisions = [line.decision for line in reversed(registry.history("counting"))]
    assert decisions == ["promoted"] * 3 + ["rolled_back"] * 2 + ["promoted", "rolled_back"]
    one_back = registry.history("counting")[3]
    assert (one_back.from_address, one_back.to_address, one_back.reason) == (third, second, "wrong answers")
    assert in_mlflow(registry) == registry.get(first).mlflow_version


def test_rollback_skips_what_was_retired_and_what_was_refused(registry: AdapterRegistry, good: Register) -> None:
    first, second, bad, third = good(), good(), good(BAD), good(BETTER)
    promote(registry, first)
    promote(registry, second)
    with pytest.raises(GateRefused):
        promote(registry, bad)
    promote(registry, third)
    registry.retire(second)
    assert registry.rollback("counting", actor="ada").to_address == first


def test_rolling_back_an_alias_that_never_was_is_an_error(registry: AdapterRegistry, good: Register) -> None:
    good()
    with pytest.raises(NotFound, match="no alias 'production'"):
        registry.rollback("counting", actor="ada")


def test_a_silent_mlflow_does_not_undo_a_decision(
    registry: AdapterRegistry, good: Register, caplog: pytest.LogCaptureFixture
) -> None:
    address = good()
    verdict = registry.judge(address, "production", POLICY)
    client = registry.tracking._client

    class Silent:
        def __getattr__(self, name: str) -> object:
            from mlflow.exceptions import MlflowException

            raise MlflowException("no answer")

    registry.tracking.__dict__["_client"] = Silent()
    registry.promote(address, "production", verdict, actor="ada")
    registry.tracking.__dict__["_client"] = client
    assert "regraft fsck --repair" in caplog.text
    assert registry.alias("counting", "production").address == address
    assert in_mlflow(registry) is None
    assert [(finding.subject, finding.repaired) for finding in registry.fsck(repair=True)] == [
        ("counting@production", True)
    ]
    assert in_mlflow(registry) == 1
    assert registry.fsck() == []


@pytest.mark.parametrize(
    ("said", "metric", "upwards"),
    [
        (None, "exact_match", True),
        (None, "perplexity", False),
        (True, "perplexity", True),
        (False, "exact_match", False),
    ],
)
def test_perplexity_improves_downwards_unless_the_policy_says_otherwise(
    said: bool | None, metric: str, upwards: bool
) -> None:
    assert SuitePolicy(suite="s", higher_is_better=said).improves_upwards(metric) is upwards


def test_a_later_number_on_too_few_items_does_not_shadow_the_one_that_counts() -> None:
    policy = Policy(suites=(SuitePolicy(suite="counting", minimum=0.6, minimum_samples=200),))
    lucky, sound = measured(1.0, id=2, samples=5), measured(0.5, id=1, samples=200)
    verdict = decide(policy, candidate="counting@2", alias="production", measured=[lucky, sound])
    assert not verdict.passed
    assert verdict.evaluations == (1,)
    assert missing_suites(policy, [lucky])["candidate"] == ["counting"]
    assert missing_suites(policy, [lucky, sound])["candidate"] == []
