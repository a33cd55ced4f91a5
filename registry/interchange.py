"""Adapter directories from elsewhere: what can be said of an adapter that this registry did not see trained."""

from typing import Any

from registry.adapter_directory import AdapterFiles

_VARIANTS = ("use_dora", "use_rslora")  # a LoRA with one of these is a method of its own in the catalogue


def method_of(files: AdapterFiles) -> str:
    """The catalogue's name of the method: from `regraft.json`, else from peft's config, else `unknown`."""
    named = (files.regraft or {}).get("method")
    if isinstance(named, str) and named:
        return named
    kind = files.config.get("peft_type")
    if not isinstance(kind, str) or not kind:
        return "unknown"
    if kind == "LORA":
        return next((variant.removeprefix("use_") for variant in _VARIANTS if files.config.get(variant)), "lora")
    return kind.lower().replace("_", "-")


def recipe_of(files: AdapterFiles, origin: str) -> dict[str, Any]:
    """The recipe of `regraft.json`; where there is none, a note of where the adapter came from.

    Without what it says of a migration kit: that may name a function to call, which a stranger's files do not decide.
    """
    recipe = (files.regraft or {}).get("recipe")
    if isinstance(recipe, dict) and recipe:
        return {key: value for key, value in recipe.items() if key != "migration_kit"}
    return {"origin": {"imported_from": origin, "adapter_config": files.config}}
