"""What suites measure, what a policy may ask of them, and what becomes of those that fail; no model is run."""

import pytest

from flows.evaluate_adapter import PartlyMeasured, as_far_as_possible, tell_failures
from flows.promote_adapter import require_measurable
from flows.suites import Prepared, metrics_of, suites_for
from infra.errors import Interrupted, InvalidInput, ServiceUnavailable
from registry.policy import Policy
from training.evaluation.suite import Suite
from training.recipe import Recipe

RECIPE = Recipe.model_validate(
    {
        "adapter": "texts",
        "base": "tiny",
        "data": {"file": "notes.jsonl"},
        "evaluation": [
            {"name": "exact", "metric": "exact_match"},
            {"name": "near", "metric": "rougeL", "also": ["bleu"]},
            {"name": "open"},
            {"name": "choices", "metric": "multiple_choice"},
            {"name": "programs", "metric": "pass@1"},
        ],
    }
)


def prepared(title: str) -> Prepared:
    return Prepared(title, "exact_match", (), (), "", None)


def test_what_a_suite_measures_is_its_own_metric_what_it_wants_also_and_what_comes_beside() -> None:
    of = {suite.name: metrics_of(suite, RECIPE) for suite in RECIPE.evaluation}
    assert of["exact"] == ("exact_match",)
    assert of["near"] == ("rougeL", "bleu")
    assert of["open"] == ("exact_match", "perplexity")
    assert of["choices"] == ("multiple_choice", "ece", "ece_equal_mass", "brier")
    assert of["programs"] == ("pass@1", "exact_program", "abstracted_match", "edit_similarity", "parses")
    assert metrics_of(Suite(task="object_counting"), None)[0] == "exact_match"


@pytest.mark.parametrize(
    ("suite", "metric", "told"),
    [
        ("exact", "rougeL", r"which measures exact_match\.\nWrite also: \[rougeL\]"),
        ("near", "bertscore", r"which measures rougeL, bleu\.\nWrite also: \[bertscore\]"),
        ("choices", "rougeL", r"multiple_choice, ece, ece_equal_mass, brier\.\nName one of these"),
        ("programs", "pass@5", r"Write also: \[pass@5\]"),
    ],
)
def test_a_policy_that_asks_a_suite_for_what_it_does_not_measure_is_refused(suite: str, metric: str, told: str) -> None:
    policy = Policy.model_validate({"suites": [{"suite": suite, "metric": metric}]})
    with pytest.raises(InvalidInput, match=f"(?s)asks for {metric} of suite '{suite}'.*{told}"):
        require_measurable(policy, [], RECIPE)


def test_a_policy_that_asks_for_what_is_measured_is_taken() -> None:
    lines = (("exact", None), ("exact", "exact_match"), ("near", "bleu"), ("open", "perplexity"), ("choices", "brier"))
    asked = [{"suite": suite, "metric": metric} for suite, metric in (*lines, ("programs", "parses"))]
    require_measurable(Policy.model_validate({"suites": asked}), [], RECIPE)


def test_a_suite_that_fails_leaves_the_others_and_is_told_at_the_end() -> None:
    def measure(suite: Prepared) -> str:
        if suite.title.startswith("odd"):
            raise ServiceUnavailable(f"{suite.title} is odd.", "Mend it.")
        return suite.title

    done, failed = as_far_as_possible(map(prepared, ("a", "odd 1", "b", "odd 2")), measure)
    assert done == ["a", "b"] and list(failed) == ["odd 1", "odd 2"]
    with pytest.raises(PartlyMeasured) as told:
        tell_failures(failed, done)
    assert told.value.what == "odd 1 could not be measured: odd 1 is odd. Nor could be measured: odd 2."
    assert (told.value.remedy, told.value.exit_code) == ("Mend it.", ServiceUnavailable.exit_code)
    assert (told.value.done, told.value.failed) == (["a", "b"], ("odd 1", "odd 2"))
    with pytest.raises(ServiceUnavailable, match=r"^odd 1 is odd\."):
        tell_failures(failed, [])
    tell_failures({}, done)


def test_ctrl_c_is_no_failure_of_a_suite() -> None:
    def measure(suite: Prepared) -> None:
        raise Interrupted("Stopped.")

    with pytest.raises(Interrupted):
        as_far_as_possible([prepared("a")], measure)


def test_what_is_named_twice_is_measured_once_and_two_suites_of_one_title_are_refused() -> None:
    assert suites_for(["navigate", "navigate"], 0, None) == (Suite(task="navigate"),)
    both = suites_for(["navigate", "boolean_expressions"], 2, 10)
    assert [suite.title() for suite in both] == ["navigate/test-2shot", "boolean_expressions/test-2shot"]
    assert suites_for(None, 0, None) == ()
