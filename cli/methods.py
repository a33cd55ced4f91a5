"""`regraft methods`: what can be trained."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from cli.console import WIDE, Json, console, facts, print_json, show
from infra.errors import NotFound

app = typer.Typer(help="The method catalogue: LoRA and its relatives.", no_args_is_help=True)


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="Only families that contain this word, e.g. additive.")] = None,
    as_json: Json = False,
) -> None:
    """Every method: family, paper, whether it merges and needs calibration data.

    Example: [bold]regraft methods list --family additive[/]
    """
    from training.methods.catalog import CATALOG, get_method

    methods = [get_method(name) for name in sorted(CATALOG)]
    cards = [(m.name, m.card) for m in methods if family is None or family.lower() in m.card.family.lower()]
    if not cards:
        families = sorted({method.card.family.partition(" /")[0] for method in methods})
        raise NotFound(f"There is no method of a family like '{family}'.", f"Families: {', '.join(families)}.")
    if as_json:
        print_json([{"name": name, **_fields(card)} for name, card in cards])
        return
    rows = [
        (
            f"[bold]{name}[/]",
            card.family,
            ", ".join(card.modality),
            card.merge,
            _CALIBRATION[card.needs_calibration],
            card.parameters,
            card.paper,
        )
        for name, card in cards
    ]
    columns = ("name", "~family", "+~modality", "merges", "+calibration", "+~parameters", "~paper")
    show(columns, rows, "")
    if console.width < WIDE:
        console.print(f"[dim]Modality, calibration and parameters: on {WIDE} columns, or with --json.[/]")


@app.command("show")
def show_(name: str, as_json: Json = False) -> None:
    """One method: what it does, its options with the paper's defaults, and how to write it in a recipe.

    Example: [bold]regraft methods show dora[/]
    """
    from training.methods.catalog import get_method

    method = get_method(name)
    fields = method.config_type.model_fields
    schema = method.config_type.model_json_schema()
    values = {key: _values(of, schema.get("$defs", {})) for key, of in schema.get("properties", {}).items()}
    if as_json:
        options = {
            key: {"default": _default(field), "values": values[key], "help": field.description}
            for key, field in fields.items()
        }
        print_json({"name": name, **_fields(method.card), "options": options})
        return
    card = method.card
    console.print(f"[bold]{name}[/]  {card.title}\n")
    facts(
        (
            ("family", card.family),
            ("paper", card.paper),
            ("parameters", card.parameters),
            ("merges", card.merge),
            ("fresh adapter", _FRESH[card.identity_at_init]),
            ("calibration", _CALIBRATION[card.needs_calibration]),
            ("modality", ", ".join(card.modality)),
            ("tested on", ", ".join(card.backbones)),
            ("refuses", ", ".join(card.refuses) or "no training option"),
        )
    )
    console.print()
    rows = [(k, escape(_yaml(_default(f))), escape(values[k]), escape(f.description or "")) for k, f in fields.items()]
    show(("option", "default", "~values", "~what it is"), rows, "No options.")
    console.print(f"\nIn a recipe:\n  [cyan]method:\n    name: {name}[/]")


@app.command("merging")
def merging(as_json: Json = False) -> None:
    """The ways to merge adapters, with their options.

    Example: [bold]regraft methods merging[/]
    """
    from training.merging.merge import METHODS

    if as_json:
        told = [
            {
                "name": name,
                "title": rule.title,
                "paper": rule.paper,
                "options": {
                    key: {"default": _default(field), "help": field.description}
                    for key, field in rule.model_fields.items()
                },
            }
            for name, rule in METHODS.items()
        ]
        print_json(told)
        return
    console.print("Of all, for LoRAs: rank (the highest of the result) and energy (the share of the update to keep).\n")
    for name, rule in METHODS.items():
        console.print(f"[bold]{name}[/]  {rule.title}  [dim]{rule.paper}[/]")
        facts(
            (f"  {key} = {escape(_yaml(_default(field)))}", escape(field.description or ""))
            for key, field in rule.model_fields.items()
            if key not in ("rank", "energy")
        )


_FRESH = {
    True: "leaves outputs as they are",
    "nearly": "hardly changes outputs",
    False: "changes outputs at once",
}


_CALIBRATION = {True: "needed", "optional": "by some options", False: "not needed"}


_KINDS = {"integer": "integer", "string": "text", "boolean": "true, false", "null": "null", "array": "list"}
_BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "multipleOf": "a multiple of",
}


def _values(schema: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    """What an option may be, by its JSON schema."""
    if "$ref" in schema:
        return _values(named[schema["$ref"].rpartition("/")[2]], named)
    if "anyOf" in schema:
        return " or ".join(filter(None, (_values(each, named) for each in schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    limits = ", ".join(f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema)
    kind = _KINDS.get(schema.get("type", ""), "")
    return f"{kind} {limits}".strip() if limits or kind else "number"


def _yaml(value: Any) -> str:
    """A default as a recipe would say it."""
    return str(value) if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _fields(card: Any) -> dict[str, Any]:
    return {name: getattr(card, name) for name in card.__dataclass_fields__}


def _default(field: Any) -> Any:
    default = field.get_default(call_default_factory=True)
    return default.model_dump() if hasattr(default, "model_dump") else default
