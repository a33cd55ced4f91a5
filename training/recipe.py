"""A recipe: everything that decides what a training makes. YAML on disk, stored whole with the version it made."""

import hashlib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from infra.documents import Section, did_you_mean, parse, read_yaml
from infra.errors import InvalidInput
from training.data.sources import DataSource
from training.evaluation.suite import Suite
from training.evaluation.suite_files import expanded
from training.methods.catalog import CATALOG, get_method
from training.migration.options import KitOptions
from training.options import MethodChoice, TrainingOptions
from training.selection.selection import Selection


def _or_boolean(schema: dict[str, Any]) -> None:
    """What a recipe may say, and stores, beside what the field becomes; Prefect checks deployments against it."""
    schema["anyOf"].append({"type": "boolean"})


class Recipe(Section):
    """What to train, on what, how, and how it is judged."""

    adapter: str = Field(description="Name of the adapter; each training makes its next version.")
    description: str = ""
    base: str = Field(description="Name of a registered base model, or hf:, path:, gguf: or wheel: reference.")
    method: MethodChoice = MethodChoice()
    data: DataSource
    selection: Selection = Selection()
    training: TrainingOptions = TrainingOptions()
    evaluation: tuple[Suite, ...] = Field(
        (), description="Suites, or names of suite files; none given: the test split of the recipe's data."
    )
    migration_kit: KitOptions | None = Field(
        KitOptions(),
        description="What is kept of the data for a migration to another base; false for nothing.",
        json_schema_extra=_or_boolean,
    )
    seed: int = Field(0, ge=0, lt=2**32)
    migrated_from: str | None = Field(
        None, description="Set by a migration: the version whose answers to synthetic inputs were trained on."
    )
    made_of: tuple[str, ...] | None = Field(
        None, description="Set by a merge or a compression: the versions that it is made of, without any training."
    )

    @field_validator("method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        if not isinstance(value, str | dict | MethodChoice):
            raise ValueError("give one method's name, or a mapping of its name and options")
        return {"name": value} if isinstance(value, str) else value

    @field_validator("migration_kit", mode="before")
    @classmethod
    def _kit_or_none(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _method_exists(self) -> "Recipe":
        if self.method.name not in CATALOG:
            raise ValueError(f"'{self.method.name}' is not a method. {did_you_mean(self.method.name, list(CATALOG))}")
        return self

    def method_config(self, source: str = "recipe") -> Any:
        """The method's options as its own config type.

        Raises:
            InvalidInput: an option that the method does not have, or a value that it cannot take.
        """
        return parse(get_method(self.method.name).config_type, self.method.options, source, prefix="method")

    def as_stored(self) -> dict[str, Any]:
        """Plain JSON values; `Recipe.model_validate` of it is this recipe."""
        stored = self.model_dump(mode="json", exclude_none=True)
        kit = self.migration_kit and self.migration_kit.model_dump(mode="json", exclude_defaults=True)
        return {**stored, "migration_kit": False if kit is None else kit or True}

    @property
    def digest(self) -> str:
        """12 hex digits that name this recipe's content, as far as it decides what is trained."""
        content = {key: value for key, value in self.as_stored().items() if key != "migration_kit"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe, method options included; relative paths in it count from the recipe's folder.

    Args:
        path: the YAML file.
        overrides: dotted keys to set on top, e.g. `{"training.steps": 10}`.

    Raises:
        NotFound: no such file.
        InvalidInput: every unknown key and wrong value, one a line.
    """
    folder = path.resolve().parent
    recipe = recipe_from(read_yaml(path), path.name, overrides, folder)
    return recipe.model_copy(
        update={
            "base": _anchored(recipe.base, folder),
            "data": recipe.data.anchored(folder),
            "evaluation": tuple(suite.anchored(folder) for suite in recipe.evaluation),
        }
    )


def recipe_from(
    content: dict[str, Any], source: str, overrides: dict[str, Any] | None = None, folder: Path | None = None
) -> Recipe:
    """A recipe from its content; `source` names the place in error messages. See `load_recipe`.

    A name in its `evaluation` stands for the suites of suites/NAME.yaml, which become part of the recipe; a path to
    such a file counts from `folder`.
    """
    content = deepcopy(content)
    for key, value in (overrides or {}).items():
        _set(content, key.split("."), value)
    if "evaluation" in content:
        content["evaluation"] = expanded(content["evaluation"], folder)
    method = content.get("method")
    chosen = method.get("name", "lora") if isinstance(method, dict) else None
    problems = []
    try:
        recipe = parse(Recipe, content, source)
    except InvalidInput as error:
        problems.append(error.what)
    if isinstance(method, dict) and isinstance(chosen, str) and chosen in CATALOG:
        options = {key: value for key, value in method.items() if key != "name"}
        try:
            parse(get_method(chosen).config_type, options, source, prefix="method")
        except InvalidInput as error:
            problems.append(error.what.replace("is not an option.", f"is not an option of '{chosen}'."))
    if problems:
        known = isinstance(chosen, str) and chosen in CATALOG
        where = f"regraft methods show {chosen}" if known else "regraft methods list"
        remedy = f"See: {where}" if problems[-1].startswith(f"{source}: method") else ""
        raise InvalidInput("\n".join(problems), remedy)
    for option in get_method(recipe.method.name).card.refuses:
        if getattr(recipe.training, option) != TrainingOptions.model_fields[option].default:
            raise InvalidInput(
                f"{source}: training.{option} does not go with '{recipe.method.name}'.",
                "Leave it out, or choose another method.",
            )
    return recipe


def _anchored(base: str, folder: Path) -> str:
    form, _, place = base.partition(":")
    return f"{form}:{folder / Path(place).expanduser()}" if form in ("path", "gguf") else base


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        inner = content.setdefault(key, {})
        if isinstance(inner, str) and key == "method":  # `method: lora` is short for a mapping
            inner = content[key] = {"name": inner}
        if not isinstance(inner, dict):
            raise InvalidInput(f"--set {'.'.join(keys)}: '{key}' is not a section of the recipe.")
        content = inner
    content[last] = value
