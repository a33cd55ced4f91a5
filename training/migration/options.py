"""What a migration, and what is kept for one, can be told."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from infra.documents import Section, parse
from infra.errors import InvalidInput
from training.options import MethodChoice, TrainingOptions


class SynthesisOptions(Section):
    """How inputs are written."""

    items: int = Field(6, ge=1, description="How many inputs a list asks for beside the seeds.")
    rows: int = Field(64, ge=1, description="Most lists written at a time; fewer where less is lacking.")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="Of the sampling.")
    top_p: float = Field(0.95, gt=0, le=1, description="Probability of the nucleus that is sampled from.")
    most_tries: int = Field(
        20, ge=1, description="Written inputs for each that is learnt from, after which to give up."
    )


class DiscriminatorOptions(Section):
    """How a discriminator is trained."""

    method: MethodChoice = Field(MethodChoice(), description="Of the catalogue, with its options.")
    training: TrainingOptions = Field(TrainingOptions(epochs=3, learning_rate=3e-4), description="As in a recipe.")
    held_out: float = Field(0.2, gt=0, lt=1, description="Share of the inputs that it is judged on, not trained on.")


class KitOptions(Section):
    """What is kept of an adapter's data, so that it can be moved without them."""

    seeds: int = Field(5, ge=1, description="Examples that are kept for ever.")
    choice: Literal["spread", "random"] = Field(
        "spread", description="Of the seeds: short, long and between, with different answers; or by chance."
    )
    redact: str | None = Field(
        None, description="MODULE:FUNCTION from text to text, through which prompts and completions of seeds go."
    )
    filtered: bool = Field(True, description="Train a discriminator, which a migration chooses by.")
    discriminator: DiscriminatorOptions = Field(DiscriminatorOptions(), description="How it is trained.")
    inputs: int = Field(250, ge=2, description="Most real and most written inputs that a discriminator is shown.")
    synthesis: SynthesisOptions = Field(SynthesisOptions(), description="How the source base writes inputs.")


class DistillationOptions(Section):
    """What the new adapter learns of the old one."""

    of: Literal["text", "logits"] = Field(
        "text", description="Its answers; or, where both bases share a vocabulary, its logits beside them."
    )
    temperature: float = Field(
        2.0, gt=0, allow_inf_nan=False, description="τ, that both models' logits are divided by."
    )
    weight: float = Field(0.5, ge=0, le=1, description="Of the logits' part of the loss; the rest is the answers'.")
    top_k: int = Field(64, ge=1, description="The old adapter's most probable tokens at each position, that are kept.")


class MigrationOptions(Section):
    """How an adapter is moved to another base model."""

    inputs: int | None = Field(
        None,
        ge=1,
        description="Synthetic inputs to learn from. Default: three for each row that there was, at most 750; of "
        "preset paper one for each, at most 250.",
    )
    preset: Literal["regraft", "paper"] = Field(
        "regraft",
        description="What is learnt from. regraft: all that is written, and the seeds; paper: the first inputs that "
        "the discriminator takes for real.",
    )
    answers: Literal["old", "settled"] = Field(
        "old",
        description="Which answers are learnt. old: the old adapter's; settled: where an adapter of the new base that "
        "learnt the other half of them answers differently, the more probable one. Takes three trainings for one.",
    )
    surplus: float = Field(
        1.0,
        ge=1,
        allow_inf_nan=False,
        description="Inputs written for each that is learnt. Above 1, those are drawn that together look like the real "
        "ones, where there is anything to choose by.",
    )
    passes: float = Field(
        2.5,
        ge=0,
        allow_inf_nan=False,
        description="Over the inputs, at least: where the old adapter's steps are fewer, more are taken. Not where "
        "training.steps or training.epochs are said, nor of preset paper.",
    )
    method: MethodChoice | None = Field(None, description="Of the new adapter. Default: the old one's, as it was made.")
    training: TrainingOptions | None = Field(None, description="Of the new adapter. Default: as the old one's recipe.")
    filtered: bool = Field(True, description="Choose by the kit's discriminator, if it has one.")
    synthesis: SynthesisOptions = Field(SynthesisOptions(), description="How the target base writes inputs.")
    distillation: DistillationOptions = Field(DistillationOptions(), description="What is learnt of the old adapter.")
    allowed_loss: float = Field(
        0.02, ge=0, le=1, description="Accuracy that may be lacking to the better of old adapter and bare target."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of what is written; items and training keep the recipe's.")


class FleetOptions(Section):
    """How each adapter of a fleet is moved: what is said goes on top of its own recipe."""

    inputs: int | None = Field(None, ge=1, description="As of a migration.")
    method: str | None = Field(None, description="Of the new adapters. Default: each one's own.")
    filtered: bool = Field(True, description="As of a migration.")
    changes: dict[str, Any] = Field({}, description="Further options of a migration, by dotted key.")

    def on(self, recipe: Mapping[str, Any]) -> MigrationOptions:
        """The options for one version, by its stored recipe.

        Raises:
            InvalidInput: a key that is no option, or a value that it cannot take.
        """
        return options_from(recipe, self.inputs, self.method, self.filtered, self.changes)


def options_from(
    recipe: Mapping[str, Any], inputs: int | None, method: str | None, filtered: bool, changes: Mapping[str, Any]
) -> MigrationOptions:
    """Options from a command line; what is changed of training and method goes on top of the old adapter's recipe.

    Args:
        recipe: of the version that is migrated, as it is stored.
        inputs: as the option of that name.
        method: a name alone.
        filtered: as the option of that name.
        changes: by dotted key, e.g. `training.steps`.

    Raises:
        InvalidInput: a key that is no option, or a value that it cannot take.
    """
    content: dict[str, Any] = {"inputs": inputs, "filtered": filtered}
    if method is not None:
        content["method"] = {"name": method}
    for key, value in changes.items():
        section, dot, option = key.partition(".")
        if not dot:
            content[section] = value
            continue
        before = dict(recipe.get(section) or {}) if section in ("training", "method") else {}
        inner = content.setdefault(section, before)
        if isinstance(inner, dict):
            inner[option] = value
    steps = content.get("training", {})
    if isinstance(steps, dict) and (said := {"training.steps", "training.epochs"} & changes.keys()):
        if "passes" in changes:
            raise InvalidInput(f"--set: {min(said)} and passes both say how long to train.", "Give one of them.")
        steps.pop("epochs" if "training.steps" in changes else "steps", None)  # one of them, the one that was said
        content["passes"] = 0
    return parse(MigrationOptions, content, "--set")
