"""`regraft methods`: what can be trained."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from cli.console import Json, console, facts, print_json, show

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
    if as_json:
        print_json([{"name": name, **_fields(card)} for name, card in cards])
        return
    rows = [
        (
            f"[bold]{name}[/]",
            card.family,
            ", ".join(card.modality),
            card.merge,
            "needed" if card.needs_calibration else "–",
            card.parameters,
            card.paper,
        )
        for name, card in cards
    ]
    columns = ("name", "~family", "+~modality", "merges", "+calibration", "+~parameters", "~paper")
    show(columns, rows, f"No method of a family like '{escape(family or '')}'.")


@app.command("show")
def show_(name: str, as_json: Json = False) -> None:
    """One method: what it does, its options with the paper's defaults, and how to write it in a recipe.

    Example: [bold]regraft methods show dora[/]
    """
    from training.methods.catalog import get_method

    method = get_method(name)
    fields = method.config_type.model_fields
    if as_json:
        options = {key: {"default": _default(field), "help": field.description} for key, field in fields.items()}
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
            ("calibration", "needed" if card.needs_calibration else "not needed"),
            ("modality", ", ".join(card.modality)),
            ("tested on", ", ".join(card.backbones)),
            ("refuses", ", ".join(card.refuses) or "no training option"),
        )
    )
    console.print()
    rows = [(k, escape(str(_default(f))), escape(f.description or "")) for k, f in fields.items()]
    show(("option", "default", "~what it is"), rows, "No options.")
    console.print(f"\nIn a recipe:\n  [cyan]method:\n    name: {name}[/]")


_FRESH = {
    True: "leaves outputs as they are",
    "nearly": "hardly changes outputs",
    False: "changes outputs at once",
}


def _fields(card: Any) -> dict[str, Any]:
    return {name: getattr(card, name) for name in card.__dataclass_fields__}


def _default(field: Any) -> Any:
    default = field.get_default(call_default_factory=True)
    return default.model_dump() if hasattr(default, "model_dump") else default
