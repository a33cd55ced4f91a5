"""Leaderboards: who is compared with whom, ranks and ties against oracles, and few statements whatever the number."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from infra.errors import NotFound
from infra.sign_flips import sign_flip_test
from registry import AdapterRegistry
from registry.leaderboard import ALPHA, against_the_first, holm, pareto
from registry.models import Adapter, Evaluation, Version, VersionState
from tests.registry.conftest import OTHER_BASE

Register = Callable[..., str]
Evaluate = Callable[..., int]


def right(number: int, of: int = 100) -> list[int]:
    return [1] * number + [0] * (of - number)


@contextmanager
def statements(registry: AdapterRegistry) -> Iterator[list[str]]:
    """What is sent to the database within the block."""
    sent: list[str] = []

    def hear(connection: object, cursor: object, statement: str, *rest: object) -> None:
        sent.append(statement)

    sa.event.listen(registry.database.engine, "before_cursor_execute", hear)
    try:
        yield sent
    finally:
        sa.event.remove(registry.database.engine, "before_cursor_execute", hear)


def test_versions_are_ranked_by_their_newest_number_across_bases_and_methods(
    registry: AdapterRegistry, register: Register, evaluate: Evaluate
) -> None:
    evaluate(register("a"), right(20), "counting/test")
    evaluate("a@1", right(90), "counting/test")
    evaluate(register("b", method="dora", base_identity=OTHER_BASE, trainable_parameters=7), right(50), "counting/test")
    evaluate(register("c"), right(40), "counting/test")
    (table,) = registry.leaderboard("counting")
    assert (table.suite, table.metric, table.samples, table.versions) == ("counting/test", "accuracy", 100, 3)
    assert [(s.rank, s.address, s.method, s.base, s.value) for s in table.standings] == [
        (1, "a@1", "lora", "tiny-a", 0.9),
        (2, "b@1", "dora", "tiny-b", 0.5),
        (3, "c@1", "lora", "tiny-a", 0.4),
    ]
    assert (table.standings[1].trainable_parameters, table.standings[1].base_parameters) == (7, 2000)


def test_numbers_on_other_items_suites_or_metrics_stand_in_tables_of_their_own(
    registry: AdapterRegistry, register: Register, evaluate: Evaluate
) -> None:
    evaluate(register("a"), right(90), "counting/test")
    evaluate(register("b"), right(80), "counting/test", fingerprint="u" * 64)
    evaluate("b@1", right(70), "counting/test-3shot")
    evaluate("b@1", right(60), "lm-eval/counting/acc")
    evaluate("b@1", right(60), "counting-more/test")
    registry.record_evaluation("a@1", "counting/test", "other", 0.5, samples=9, dataset_fingerprint="t" * 64)
    found = [(t.suite, t.metric, [s.address for s in t.standings]) for t in registry.leaderboard("counting")]
    assert sorted(found) == [
        ("counting/test", "accuracy", ["a@1"]),
        ("counting/test", "accuracy", ["b@1"]),
        ("counting/test", "other", ["a@1"]),
        ("counting/test-3shot", "accuracy", ["b@1"]),
        ("lm-eval/counting/acc", "accuracy", ["b@1"]),
    ]
    assert [t.suite for t in registry.leaderboard("counting/test-3shot")] == ["counting/test-3shot"]
    assert [t.metric for t in registry.leaderboard("counting", metric="other")] == ["other"]


def test_perplexities_are_compared_on_one_base_only_and_less_is_better(
    registry: AdapterRegistry, register: Register
) -> None:
    for adapter, base, value in (("a", "a" * 64, 9.0), ("b", "a" * 64, 4.0), ("c", OTHER_BASE, 2.0)):
        address = register(adapter, base_identity=base)
        registry.record_evaluation(address, "fluency", "perplexity", value, samples=9, dataset_fingerprint="t" * 64)
    tables = registry.leaderboard("fluency")
    assert [[(s.rank, s.address) for s in t.standings] for t in tables] == [[(1, "b@1"), (2, "a@1")], [(1, "c@1")]]


def test_on_unknown_items_nothing_is_ranked(registry: AdapterRegistry, register: Register, evaluate: Evaluate) -> None:
    for adapter, number in (("a", 90), ("b", 10)):
        evaluate(register(adapter), right(number), "counting/test", fingerprint=None)
    (table,) = registry.leaderboard("counting")
    assert table.dataset_fingerprint is None
    assert [(s.rank, s.p_value, s.ties_best, s.pareto) for s in table.standings] == [(None, None, False, False)] * 2


def test_an_adapter_has_one_line_for_each_base_and_method_unless_all_versions_are_asked_for(
    registry: AdapterRegistry, register: Register, evaluate: Evaluate
) -> None:
    for number in (10, 90, 30):
        evaluate(register("a"), right(number), "counting/test")
    evaluate(register("a", base_identity=OTHER_BASE), right(50), "counting/test")
    evaluate(register("a", method="dora"), right(60), "counting/test")

    def lines(**asked: object) -> list[str]:
        (table,) = registry.leaderboard("counting", **asked)
        return [standing.address for standing in table.standings]

    assert lines() == ["a@5", "a@4", "a@3"]  # the newest, not the best
    registry.promote("a@1", "production", None, actor="ada", reason="x", force=True)
    assert lines() == ["a@5", "a@4", "a@1"]
    assert lines(all_versions=True) == ["a@2", "a@5", "a@4", "a@3", "a@1"]
    registry.retire("a@2")
    assert lines(all_versions=True) == ["a@5", "a@4", "a@3", "a@1"]
    assert lines(base="tiny-b") == ["a@4"]
    assert lines(method="dora") == ["a@5"]
    (cut,) = registry.leaderboard("counting", all_versions=True, limit=2)
    assert (cut.versions, [s.address for s in cut.standings]) == (4, ["a@5", "a@4"])
    assert registry.leaderboard("counting", method="ia3") == []


def test_all_that_are_not_significantly_worse_than_the_best_share_the_first_rank(
    registry: AdapterRegistry, register: Register, evaluate: Evaluate
) -> None:
    for adapter, number in (("a", 80), ("b", 78), ("c", 70), ("d", 20)):
        evaluate(register(adapter), right(number), "counting/test")
    (table,) = registry.leaderboard("counting")
    raw = [float(stats.binomtest(0, 80 - number).pvalue) for number in (78, 70, 20)]
    wanted = [min(1.0, 1 * raw[0]), 2 * raw[1], 3 * raw[2]]  # Holm by hand: the largest is multiplied by one
    assert [s.p_value for s in table.standings[1:]] == pytest.approx(wanted)
    assert wanted[1] <= ALPHA < wanted[0]
    assert [(s.rank, s.ties_best) for s in table.standings] == [(1, True), (1, True), (3, False), (4, False)]


@given(st.lists(st.lists(st.integers(0, 1), min_size=12, max_size=12), min_size=2, max_size=6))
def test_the_paired_tests_are_scipys_exact_ones(outcomes: list[list[int]]) -> None:
    first, *others = outcomes
    found = against_the_first([*outcomes, None, [1, 0]], [None] * (len(outcomes) + 2))
    wanted = []
    for other in others:
        b = sum(x > y for x, y in zip(first, other, strict=True))
        c = sum(x < y for x, y in zip(first, other, strict=True))
        wanted.append(float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0)
    assert found[0] is None and found[-2:] == [None, None]
    assert found[1:-2] == pytest.approx(wanted)


def test_text_metrics_and_perplexities_are_ranked_by_sign_flips_of_their_items(
    registry: AdapterRegistry, register: Register
) -> None:
    generator = np.random.default_rng(0)
    best = generator.uniform(0.4, 0.6, 40)
    of = {"a": best, "b": best - generator.normal(0.002, 0.05, 40), "c": best - generator.normal(0.1, 0.05, 40)}
    for adapter, scores in of.items():
        address, kept = register(adapter), {"samples": 40, "dataset_fingerprint": "t" * 64}
        registry.record_evaluation(address, "texts", "rougeL", float(scores.mean()), scores=scores.tolist(), **kept)
        losses, value = [(float(1 - score), 1) for score in scores], float(np.exp(1 - scores.mean()))
        registry.record_evaluation(address, "texts", "perplexity", value, components=losses, **kept)
    raw = [sign_flip_test((best - of[name]).tolist()) for name in "bc"]
    for table in registry.leaderboard("texts"):
        assert [s.address for s in table.standings] == ["a@1", "b@1", "c@1"]
        assert [s.p_value for s in table.standings[1:]] == pytest.approx([raw[0], 2 * raw[1]])
        assert [s.rank for s in table.standings] == [1, 1, 3]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_holm_rejects_as_the_step_down_procedure_does(p_values: list[float], rng: random.Random) -> None:
    rng.shuffle(p_values)
    rejected, order = set(), sorted(range(len(p_values)), key=lambda place: p_values[place])
    for step, place in enumerate(order):
        if p_values[place] > ALPHA / (len(p_values) - step):
            break
        rejected.add(place)
    adjusted = holm([*p_values, None])
    assert adjusted[-1] is None
    sure = {place for place, p in enumerate(adjusted[:-1]) if p is not None and abs(p - ALPHA) > 1e-12}
    assert {place for place in sure if adjusted[place] <= ALPHA} == rejected & sure


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_the_pareto_front_is_what_brute_force_finds(points: list[tuple[int, int, int]]) -> None:
    def dominated(point: tuple[int, int, int]) -> bool:
        score, a, b = point
        return any(s >= score and x <= a and y <= b and (s, x, y) != point for s, x, y in points)

    wanted = {place for place, point in enumerate(points) if not dominated(point)}
    assert pareto([float(score) for score, _, _ in points], [(a, b) for _, a, b in points]) == wanted


def test_an_unknown_task_names_a_close_one_and_all_there_are(
    registry: AdapterRegistry, register: Register, evaluate: Evaluate
) -> None:
    with pytest.raises(NotFound, match="Nothing was measured yet"):
        registry.leaderboard("counting")
    evaluate(register(), right(3), "counting/test")
    evaluate("counting@1", right(3), "fluency")
    with pytest.raises(NotFound, match=r"(?s)'countin'.*Did you mean 'counting'\? Measured were: counting/test, flu"):
        registry.leaderboard("countin")
    with pytest.raises(NotFound, match="no base model 'nobase'"):
        registry.leaderboard("counting", base="nobase")


def test_a_wildcard_in_a_task_is_a_letter_like_others(
    registry: AdapterRegistry, register: Register, evaluate: Evaluate
) -> None:
    evaluate(register(), right(3), "counting/test")
    for text in ("count_ng", "%", "c%"):
        with pytest.raises(NotFound):
            registry.leaderboard(text)


def test_ten_thousand_versions_take_one_statement(registry: AdapterRegistry, register: Register) -> None:
    register("seed")
    rng = random.Random(0)
    with registry.database.writing() as session:
        session.add_all([Adapter(id=n, name=f"a{n}") for n in range(2, 10_002)])
        session.flush()
        versions = [
            {
                "id": n, "uid": f"u{n}", "adapter_id": n, "number": 1, "base_model_id": 1, "method": "lora",
                "recipe": {}, "metrics": {}, "artifact_sha256": "0" * 64, "size_bytes": rng.randrange(10**6),
                "trainable_parameters": 1, "mlflow_version": 1, "state": VersionState.READY,
            }
            for n in range(2, 10_002)
        ]  # fmt: skip
        session.execute(sa.insert(Version), versions)
        measured = []
        for n in range(2, 10_002):
            outcomes = [int(rng.random() < 0.5) for _ in range(20)]
            measured.append(
                {
                    "version_id": n,
                    "suite": "big/test",
                    "metric": "exact_match",
                    "value": sum(outcomes) / 20,
                    "samples": 20,
                    "dataset_fingerprint": "t" * 64,
                    "outcomes": outcomes,
                }
            )
        session.execute(sa.insert(Evaluation), measured)
    with statements(registry) as sent:
        (table,) = registry.leaderboard("big")
    assert len([statement for statement in sent if not statement.startswith("BEGIN")]) == 1
    assert table.versions == len(table.standings) == 10_000
    values = [standing.value for standing in table.standings]
    assert values == sorted(values, reverse=True)
    assert sum(standing.pareto for standing in table.standings) >= 1
