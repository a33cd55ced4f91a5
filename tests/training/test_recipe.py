"""Recipes: what they refuse, and how they say it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import InvalidInput, NotFound
from training.recipe import Recipe, load_recipe, recipe_from

MINIMAL: dict[str, Any] = {"adapter": "counting", "base": "path:model", "data": {"task": "object_counting"}}


def written(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **sections}))
    return path


def test_a_minimal_recipe_trains_a_lora(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path))
    assert recipe.method.name == "lora"
    assert recipe.method_config().rank == 8


def test_the_stored_form_is_the_same_recipe_and_the_same_digest(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, method={"name": "dora", "rank": 4}, training={"steps": 5}))
    again = Recipe.model_validate(recipe.as_stored())
    assert again == recipe
    assert again.digest == recipe.digest
    assert load_recipe(written(tmp_path, training={"steps": 6})).digest != recipe.digest


def test_what_is_kept_for_a_migration_is_stored_briefly_and_names_no_other_training(tmp_path: Path) -> None:
    usual = load_recipe(written(tmp_path))
    for said, stored in ((True, True), (False, False), ({"seeds": 3}, {"seeds": 3}), ({"inputs": 250}, True)):
        recipe = load_recipe(written(tmp_path, migration_kit=said))
        assert recipe.as_stored()["migration_kit"] == stored
        assert Recipe.model_validate(recipe.as_stored()) == recipe
        assert recipe.digest == usual.digest
    assert load_recipe(written(tmp_path, migration_kit=False)).migration_kit is None


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path, method={"rnak": 4}, data={"task": "object_countin"}, training={"learning_rate": float("inf")}
    )
    with pytest.raises(InvalidInput) as refused:
        load_recipe(path)
    places = [line.removeprefix("recipe.yaml: ").split(" ")[0] for line in refused.value.what.splitlines()]
    assert places == ["data:", "training.learning_rate:", "method.rnak"]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"method": {"name": "lora", "rnak": 4}}, "method.rnak is not an option of 'lora'. Did you mean 'rank'?"),
        ({"method": "loar"}, "'loar' is not a method. Did you mean 'lora'?"),
        ({"method": ["lora"]}, "method: give one method's name, or a mapping of its name and options"),
        ({"method": "PiSSA"}, "Did you mean 'pissa'?"),
        ({"method": {"name": "adalora", "rank": 9, "initial_rank": 4}}, "initial_rank must be no lower than rank, 9"),
        ({"method": {"name": "lora-sb", "learning_rate": 1e9}}, "method.learning_rate: Input should be less than"),
        ({"method": {"name": "llm-adapters", "scale": 0}}, "at 0 nothing would train"),
        ({"method": {"name": ["lora"]}}, "method.name: give a text"),
        ({"method": {"name": "lora", "targets": {"a": 1}}}, "method.targets: give a text or a list"),
        ({"method": {"name": "lora", "exclude": "q_proj"}}, "method.exclude: give a list (given: 'q_proj')"),
        ({"method": {"name": "lora", "alpha": "1e300"}}, "method.alpha: give a whole number (given: '1e300')"),
        ({"method": {"name": "lora", "alpha": 0.5}}, "method.alpha: give a whole number (given: 0.5)"),
        ({"method": {"name": "lora", "rank": True}}, "method.rank: give a number, not true or false (given: True)"),
        ({"method": {"name": "llm-adapters", "scale": "half"}}, "method.scale: give a number or 'learned'"),
        ({"method": {"name": "lora-ga", "gamma": 1e-300}}, "method.gamma: Input should be greater than"),
        ({"training": {"steps": 10**21}}, "training.steps: Input should be less than"),
        ({"trainng": {}}, "trainng is not an option. Did you mean 'training'?"),
        ({"training": {"stesp": 4}}, "training.stesp is not an option. Did you mean 'steps'?"),
        ({"training": {"steps": 4, "epochs": 1}}, "give steps or epochs, not both"),
        ({"training": {"steps": 0}}, "training.steps"),
        ({"training": {"early_stopping": 2}}, "early_stopping needs validate_every"),
        ({"data": {"task": "object_countin"}}, "Did you mean 'object_counting'?"),
        ({"data": {}}, "exactly one of task, file, dataset and selected"),
        ({"evaluation": [{"metrc": "exact_match"}]}, "evaluation[0].metrc is not an option. Did you mean 'metric'?"),
        ({"seed": -1}, "seed"),
        ({"migration_kit": {"seds": 3}}, "migration_kit.seds is not an option. Did you mean 'seeds'?"),
        ({"migration_kit": "no"}, "migration_kit"),
        ({"method": "prefix-tuning", "training": {"gradient_checkpointing": True}}, "does not go with 'prefix-tuning'"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_was_meant(
    tmp_path: Path, sections: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        load_recipe(written(tmp_path, **sections))
    assert "recipe.yaml: " in refused.value.what
    assert told in refused.value.what


def test_a_mistake_in_a_methods_options_leads_to_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as refused:
        load_recipe(written(tmp_path, method={"name": "scaling-sft", "accumulate": 30}))
    assert refused.value.what == "recipe.yaml: method: accumulate must be below reselect_every, 20; it is 30"
    assert refused.value.remedy == "See: regraft methods show scaling-sft"


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as refused:
        load_recipe(written(tmp_path, training={"stesp": 4, "learning_rate": -1.0}))
    assert len(refused.value.what.splitlines()) == 2


def test_overrides_go_on_top_and_into_the_short_form_of_a_method(tmp_path: Path) -> None:
    path = written(tmp_path, method="lora", training={"steps": 3})
    recipe = load_recipe(path, {"method.rank": 16, "training.batch_size": 2})
    assert recipe.method_config().rank == 16
    assert (recipe.training.steps, recipe.training.batch_size) == (3, 2)
    with pytest.raises(InvalidInput, match="not a section"):
        load_recipe(path, {"adapter.name": "x"})


@pytest.mark.parametrize("said", ["on", "off", "auto"])
def test_a_bare_on_or_off_is_a_word_and_no_truth_value(tmp_path: Path, said: str) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text() + f"training: {{kernels: {said}}}\n")
    assert load_recipe(path).training.kernels == said
    assert load_recipe(written(tmp_path), {"training.kernels": yaml.safe_load(said)}).training.kernels == said


def test_relative_paths_count_from_the_folder_of_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, data={"file": "data.jsonl"}))
    assert recipe.base == f"path:{tmp_path / 'model'}"
    assert recipe.data.file == tmp_path / "data.jsonl"


@pytest.mark.parametrize("text", ["- a\n- list\n", "a: [1\n", "\xff\xfe"])
def test_what_is_no_mapping_of_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"recipe\.yaml"):
        load_recipe(path)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_overriding_leaves_the_content_it_was_given_alone() -> None:
    content = {**MINIMAL, "training": {"steps": 3}}
    recipe_from(content, "stored", {"training.steps": 9})
    assert content["training"] == {"steps": 3}
