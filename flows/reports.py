"""What a flow run leaves in Prefect's UI: tables, markdown, a picture of the training curve."""

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.pictures import as_png, axes_of_a_picture
from flows.telling import tell_prefect
from training.recipe import Recipe

if TYPE_CHECKING:
    from training.progress import TrainingOutcome


def report_recipe(recipe: Recipe) -> None:
    """The recipe as YAML."""
    text = yaml.safe_dump(recipe.as_stored(), sort_keys=False)
    _leave(create_markdown_artifact, f"```yaml\n{text}```", recipe.adapter, "recipe")


def report_table(adapter: str, subject: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table whose columns are the rows' keys."""
    _leave(create_table_artifact, [dict(row) for row in rows], adapter, subject)


def report_curve(adapter: str, outcome: "TrainingOutcome") -> bytes:
    """The loss over the steps as an image; returns the PNG."""
    picture = training_curve(adapter, outcome)
    report_picture(adapter, "training curve", picture)
    return picture


def report_picture(adapter: str, subject: str, png: bytes) -> None:
    """An image."""
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    _leave(create_image_artifact, url, adapter, subject)


def training_curve(adapter: str, outcome: "TrainingOutcome") -> bytes:
    """PNG of training and validation loss over optimiser steps."""
    figure, axes = axes_of_a_picture(6.4, 3.2)
    steps, losses = zip(*outcome.losses, strict=True) if outcome.losses else ((), ())
    axes.plot(steps, losses, color="#3b6ea5", linewidth=1.2, label="training")
    if outcome.validation_losses:
        axes.plot(*zip(*outcome.validation_losses, strict=True), "o-", color="#c8553d", label="validation")
        axes.legend(frameon=False)
    axes.set(title=adapter, xlabel="step", ylabel="loss (nats per token)")
    return as_png(figure)


def _leave(create: Callable[..., object], content: object, adapter: str, subject: str) -> None:
    tell_prefect(
        f"the {subject} of {adapter}",
        lambda: create(content, key=_key(adapter, subject), description=subject.capitalize()),
    )


def _key(adapter: str, subject: str) -> str:
    """Prefect's artifact keys take lower-case letters, digits and dashes only."""
    return "".join(c if c.isalnum() else "-" for c in f"{adapter}-{subject}".lower())
