"""The whole life of a version in one run: select data, train, register, measure, promote."""

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.promote_adapter import Promotion, promote_adapter
from flows.train_adapter import TrainedVersion, train_adapter
from registry.policy import Policy
from training.recipe import Recipe


class Lifecycle(BaseModel):
    """What was trained, and what the gate said."""

    model_config = ConfigDict(frozen=True)

    trained: TrainedVersion
    promotion: Promotion


@flow(name="lifecycle", flow_run_name="life of {recipe.adapter}")
def lifecycle(recipe: Recipe, alias: str = "production", policy: Policy | None = None) -> Lifecycle:
    """Train by a recipe and put the new version behind an alias, if the policy allows it.

    A refusal is a result, not a failure: the version stays in the registry, the alias stays where it was.
    """
    trained = train_adapter(recipe)
    return Lifecycle(trained=trained, promotion=promote_adapter(trained.address, alias=alias, policy=policy))
