"""The lifecycle through a running Prefect server, on a tiny model."""

from collections.abc import Callable
from typing import Any

import pytest

from infra.settings import Settings
from registry import AdapterRegistry
from training.recipe import Recipe

pytestmark = pytest.mark.services

Content = Callable[..., dict[str, Any]]
_LENIENT = {"suites": [{"suite": "boolean_expressions/test", "minimum": 0.0, "max_regression": 1.0}]}
_STRICT = {"suites": [{"suite": "boolean_expressions/test", "minimum": 0.99}]}


def test_a_version_is_trained_measured_promoted_and_loads_again(connected: Settings, recipe_content: Content) -> None:
    from flows.lifecycle import lifecycle
    from registry.policy import Policy
    from serving.loading import load

    life = lifecycle(Recipe.model_validate(recipe_content("whole-life")), policy=Policy.model_validate(_LENIENT))

    assert life.trained.address == "whole-life@1"
    assert life.trained.evaluations[0].samples == 24
    assert life.promotion.moved
    registry = AdapterRegistry()
    version = registry.get("whole-life@production")
    assert version.number == 1
    assert version.artifact_sha256 == life.trained.artifact_sha256
    (measured,) = life.trained.evaluations
    kept = registry.evaluations("whole-life@1")  # newest first: the suite's own metric
    assert [e.metric for e in kept] == ["multiple_choice", "brier", "ece_equal_mass", "ece"]
    assert [e.value for e in kept] == [measured.value, *(other.value for other in reversed(measured.beside))]
    assert len(kept[1].scores) == len(kept[2].components) == 24
    loaded = load("whole-life@production")
    assert len(loaded.generate(["not ( True ) is"], max_new_tokens=4)) == 1


def test_training_by_the_stored_recipe_makes_the_same_tensors(connected: Settings, recipe_content: Content) -> None:
    from flows.train_adapter import stored_recipe, train_adapter

    first = train_adapter(Recipe.model_validate(recipe_content("again")), evaluate=False)
    second = train_adapter(stored_recipe("again@1", {}), evaluate=False)

    assert second.address == "again@2"
    registry = AdapterRegistry()
    tensors = [
        (registry.materialise(version.address) / "adapter_model.safetensors").read_bytes()
        for version in (first, second)
    ]
    assert tensors[0] == tensors[1]


def test_the_gate_refuses_and_leaves_the_alias_where_it_was(connected: Settings, recipe_content: Content) -> None:
    from flows.promote_adapter import promote_adapter
    from flows.train_adapter import train_adapter
    from infra.errors import NotFound
    from registry.policy import Policy

    trained = train_adapter(Recipe.model_validate(recipe_content("too-weak")), evaluate=False)
    promotion = promote_adapter(trained.address, policy=Policy.model_validate(_STRICT))

    assert not promotion.moved
    assert any(not check.passed for check in promotion.checks)
    with pytest.raises(NotFound):
        AdapterRegistry().get("too-weak@production")
    (line,) = AdapterRegistry().history("too-weak")
    assert line.decision == "refused"
    assert line.report["checks"]


def test_a_forced_promotion_needs_a_reason_and_records_it(connected: Settings, recipe_content: Content) -> None:
    from flows.promote_adapter import promote_adapter
    from flows.train_adapter import train_adapter
    from infra.errors import InvalidInput
    from registry.policy import Policy

    trained = train_adapter(Recipe.model_validate(recipe_content("forced")), evaluate=False)
    strict = Policy.model_validate(_STRICT)
    with pytest.raises(InvalidInput, match="reason"):
        promote_adapter(trained.address, policy=strict, force=True)
    promotion = promote_adapter(trained.address, policy=strict, force=True, reason="agreed with Ada")

    assert promotion.moved
    (line,) = [p for p in AdapterRegistry().history("forced") if p.decision == "forced"]
    assert (line.reason, line.actor) == ("agreed with Ada", "tester")


def test_nothing_is_trained_while_the_data_are_the_same(connected: Settings, recipe_content: Content) -> None:
    from flows.train_adapter import train_adapter

    recipe = Recipe.model_validate(recipe_content("watchful"))
    first = train_adapter(recipe, evaluate=False, only_if_data_changed=True)
    second = train_adapter(recipe, evaluate=False, only_if_data_changed=True)
    other = Recipe.model_validate(recipe_content("watchful", seed=5))
    third = train_adapter(other, evaluate=False, only_if_data_changed=True)

    assert (first.unchanged, second.unchanged, third.unchanged) == (False, True, False)
    assert second.address == first.address == "watchful@1"
    assert third.address == "watchful@2"


def test_the_run_is_in_mlflow_with_metrics_model_version_and_alias(
    connected: Settings, recipe_content: Content
) -> None:
    from flows.lifecycle import lifecycle
    from infra.mlflow_client import mlflow_client
    from registry.policy import Policy

    life = lifecycle(Recipe.model_validate(recipe_content("mirrored")), policy=Policy.model_validate(_LENIENT))
    client = mlflow_client(connected)
    assert life.trained.mlflow_run_id is not None
    run = client.get_run(life.trained.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert run.data.params["method.rank"] == "4"
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["reliability", "training-curve.png"]
    (diagram,) = client.list_artifacts(run.info.run_id, "reliability")
    assert diagram.path == "reliability/boolean_expressions-test.png"
    mirrored = client.get_model_version_by_alias("mirrored", "production")
    assert mirrored.run_id == run.info.run_id
    assert mirrored.tags["regraft.artifact_sha256"] == life.trained.artifact_sha256


def test_prefect_shows_recipe_selection_curve_and_evaluation(connected: Settings, recipe_content: Content) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    from flows.train_adapter import train_adapter

    train_adapter(Recipe.model_validate(recipe_content("pictured")))
    wanted = {f"pictured-{subject}" for subject in ("recipe", "selection", "training-curve", "evaluation")}
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(like_="pictured-%")))
    assert wanted <= {artifact.key for artifact in found}
    (curve,) = [artifact for artifact in found if artifact.key == "pictured-training-curve"]
    assert str(curve.data).startswith("data:image/png;base64,")


def test_versions_of_other_seeds_are_compared_on_the_candidates_items(
    connected: Settings, recipe_content: Content
) -> None:
    from flows.promote_adapter import promote_adapter
    from flows.train_adapter import train_adapter
    from registry.policy import Policy

    lenient = Policy.model_validate(_LENIENT)
    for seed in (0, 1):
        trained = train_adapter(Recipe.model_validate(recipe_content("reseeded", seed=seed)))
        promotion = promote_adapter(trained.address, policy=lenient)
        assert promotion.moved, promotion.checks
    registry = AdapterRegistry()
    candidates = registry.evaluations("reseeded@2")[0]
    assert candidates.dataset_fingerprint in [e.dataset_fingerprint for e in registry.evaluations("reseeded@1")]
