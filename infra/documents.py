"""YAML documents that people write (recipes, policies), read into pydantic models with errors that teach."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from infra.errors import InvalidInput, NotFound

Document = TypeVar("Document", bound=BaseModel)


class Section(BaseModel):
    """A document, or a part of one, in which every key is known, and true is not the number 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _types_in(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("give a number, not true or false")
        return value


def did_you_mean(word: str, known: list[str], prefix: str = "") -> str:
    """`Did you mean 'rank'?`, or the known words where none is close; each shown behind `prefix`."""
    as_lower = {each.lower(): each for each in known}
    close = get_close_matches(word.lower(), as_lower, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{prefix}{as_lower[close[0]]}'?"
    return f"Known: {', '.join(f'{prefix}{each}' for each in sorted(known))}."


def spread_defaults(content: Any, over: str) -> Any:
    """The mapping without its `defaults`, which are put under each mapping of the list `over`, for a validator."""
    if not isinstance(content, dict) or "defaults" not in content:
        return content
    defaults, items = content["defaults"], content.get(over)
    if not isinstance(defaults, dict) or not isinstance(items, list):
        return content
    spread = [{**defaults, **item} if isinstance(item, dict) else item for item in items]
    return {**{key: value for key, value in content.items() if key != "defaults"}, over: spread}


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
            f"{path} holds {_named(content)}, but a mapping of keys is wanted.", "Write lines of KEY: VALUE."
        )
    return content


def _named(content: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(content), f"a {type(content).__name__}")


def parse(
    document: type[Document], content: dict[str, Any], source: str, prefix: str = "", remedy: str = ""
) -> Document:
    """`content` as a `document`; `source` and `prefix` name the place in error messages, `remedy` says where to look.

    Raises:
        InvalidInput: every unknown key, missing key and wrong value, one a line.
    """
    try:
        return document.model_validate(content)
    except ValidationError as error:
        problems = _explained(document, _causes(error.errors(include_url=False)), prefix)
        raise InvalidInput("\n".join(f"{source}: {problem}" for problem in problems), remedy) from None


def told(error: ValueError) -> str:
    """What is wrong with a file that a program wrote, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first, *more = error.errors(include_url=False)
    place = ".".join(map(str, first["loc"]))
    return f"{place + ': ' if place else ''}{_message([first])}{f', and {len(more)} more' if more else ''}"


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without what only follows from another: a list is not too short when one of its items is wrong."""
    return [
        detail
        for detail in details
        if detail["type"] != "too_short"
        or not any(other is not detail and other["loc"][: len(detail["loc"])] == detail["loc"] for other in details)
    ]


def _explained(document: type[BaseModel], details: list[ErrorDetails], prefix: str) -> list[str]:
    """One line for each place, where a value may have failed to be any of several things."""
    places: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in details:
        places.setdefault(_place(document, detail), []).append(detail)
    return [_explain(document, list(place), several, prefix) for place, several in places.items()]


def _place(document: type[BaseModel], detail: ErrorDetails) -> tuple[str, ...]:
    """Where it is, without pydantic's names for the members of a union."""
    models, is_mapping, kept = [document], False, []
    unknown = len(detail["loc"]) if detail["type"] == "extra_forbidden" else None
    for number, part in enumerate(detail["loc"], start=1):
        annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        if annotations:
            models = [inner for annotation in annotations for inner in _models_in(annotation)]
            is_mapping = any(_is_mapping(annotation) for annotation in annotations)
        elif not (isinstance(part, int) or is_mapping or number == unknown):
            continue
        kept.append(str(part))
    return tuple(kept)


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or any(map(_is_mapping, get_args(annotation)))


def _explain(document: type[BaseModel], location: list[str], details: list[ErrorDetails], prefix: str) -> str:
    detail = details[0]
    name = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in [*filter(None, [prefix]), *location])
    name = name.removeprefix(".")
    if detail["type"] == "extra_forbidden":
        return f"{name} is not an option. {did_you_mean(location[-1], _known_keys(document, location[:-1]))}"
    if detail["type"] == "missing":
        return f"{name} is missing."
    if detail["type"] == "too_short" and not detail.get("input"):
        return f"{name} is empty."
    message = _message(details)
    given = detail.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{name}: {message}{shown}" if name else f"{message}{shown}"


def _message(details: list[ErrorDetails]) -> str:
    """What is wrong with a value; of the wrong kind only where it is of none of the right ones."""
    others = [detail for detail in details if detail["type"] not in _KINDS]
    if others:
        return others[0]["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    kinds = [_KINDS[detail["type"]] or str(detail["ctx"]["expected"]) for detail in details]
    return f"give {' or '.join(dict.fromkeys(kinds))}"


_KINDS = {
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "literal_error": "",
}


def _known_keys(document: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the model that `path` leads to, through optionals, lists and unions."""
    models = [document]
    for part in path:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    return sorted({field.alias or name for model in models for name, field in model.model_fields.items()})


def _types_in(annotation: Any) -> set[Any]:
    inner = [kind for argument in get_args(annotation) for kind in _types_in(argument)]
    return {annotation, *inner} if isinstance(annotation, type) else set(inner)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
