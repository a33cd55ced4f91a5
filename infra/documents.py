"""YAML documents that people write (recipes, policies), read into pydantic models with errors that teach."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from infra.errors import InvalidInput, NotFound

Document = TypeVar("Document", bound=BaseModel)


def did_you_mean(word: str, known: list[str], prefix: str = "") -> str:
    """`Did you mean 'rank'?`, or the known words where none is close; each shown behind `prefix`."""
    as_lower = {each.lower(): each for each in known}
    close = get_close_matches(word.lower(), as_lower, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{prefix}{as_lower[close[0]]}'?"
    return f"Known: {', '.join(f'{prefix}{each}' for each in sorted(known))}."


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        NotFound: no such file.
        InvalidInput: not UTF-8, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise NotFound(f"{path} is not there.", "Check the path; relative paths start at the working directory.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not UTF-8 text.", "Is it the right file?") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InvalidInput(
            f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)}).",
            "Indent with spaces, and put quotes around a text that holds ': ' or begins with a special character.",
        ) from None
    if content is None:
        raise InvalidInput(f"{path} is empty.", "Write lines of KEY: VALUE.")
    if not isinstance(content, dict):
        raise InvalidInput(
            f"{path} holds {type(content).__name__}, but a mapping of keys is wanted.", "Write lines of KEY: VALUE."
        )
    return content


def parse(document: type[Document], content: dict[str, Any], source: str, prefix: str = "") -> Document:
    """`content` as a `document`; `source` and `prefix` name the place in error messages.

    Raises:
        InvalidInput: every unknown key, missing key and wrong value, one a line.
    """
    try:
        return document.model_validate(content)
    except ValidationError as error:
        problems = [_explain(document, detail, prefix) for detail in _causes(error.errors(include_url=False))]
        raise InvalidInput("\n".join(f"{source}: {problem}" for problem in problems)) from None


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without what only follows from another: a list is not too short when one of its items is wrong."""
    return [
        detail
        for detail in details
        if detail["type"] != "too_short"
        or not any(other is not detail and other["loc"][: len(detail["loc"])] == detail["loc"] for other in details)
    ]


def _explain(document: type[BaseModel], detail: ErrorDetails, prefix: str) -> str:
    location = [str(part) for part in detail["loc"]]
    name = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in [*filter(None, [prefix]), *location])
    name = name.removeprefix(".")
    if detail["type"] == "extra_forbidden":
        return f"{name} is not an option. {did_you_mean(location[-1], _known_keys(document, location[:-1]))}"
    if detail["type"] == "missing":
        return f"{name} is missing."
    if detail["type"] == "too_short" and not detail.get("input"):
        return f"{name} is empty."
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = detail.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{name}: {message}{shown}" if name else f"{message}{shown}"


def _known_keys(document: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the model that `path` leads to, through optionals, lists and unions."""
    models = [document]
    for part in path:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    return sorted({field.alias or name for model in models for name, field in model.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
