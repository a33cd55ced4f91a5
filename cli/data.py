"""`regraft data`: rows selected from large pools, kept as data sets that recipes train on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cli.console import Json, ago, console, facts, print_json, show, size

if TYPE_CHECKING:
    from flows.select_rows import SelectedRows

app = typer.Typer(
    help="Data sets: rows that were selected from a pool of any size, with their scores. Recipes train on them.",
    no_args_is_help=True,
)


@app.command("select")
def select(
    pool: Annotated[
        list[str] | None,
        typer.Argument(metavar="[POOL]...", help="JSONL (also .gz) or Parquet files, or patterns in quotes."),
    ] = None,
    name: Annotated[str, typer.Option("--as", help="Name of the data set; this becomes its next version.")] = "",
    method: Annotated[
        str | None, typer.Option(help="got-d (default), dsir, nearest, k-centre, perplexity or random.")
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Rows to keep. (perplexity: --share)")] = None,
    share: Annotated[float | None, typer.Option(help="Of perplexity: share of the rows to keep. Default 0.2.")] = None,
    target: Annotated[
        str | None, typer.Option(help="What the rows are wanted for: a file of such texts, or a built-in task.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of perplexity: the base model that is asked.")] = None,
    deduplicate: Annotated[str | None, typer.Option(help="exact (default), near or none.")] = None,
    decontaminate: Annotated[
        list[str] | None, typer.Option(metavar="TASK|FILE", help="Drop rows with a piece of these evaluation items.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Selection in YAML; what is said here goes on top of it.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of a selection: docs/selection.md.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose rows of a pool of up to millions, and keep them with their scores as a version of a data set.

    Duplicates go first, then what holds a piece of an evaluation set; of the rest the method chooses. GOT-D takes what
    moves the pool most toward the target (optimal transport of embeddings), DSIR draws by n-gram importance, perplexity
    keeps what a base model finds least surprising. The pool is read as a stream: memory stays small. Vectors are kept,
    so that a second selection, or one that was stopped, does not embed again. Where the setting ray names a cluster,
    its workers share the work.

    Examples:
      [bold]regraft data select 'web/*.parquet' --target object_counting --budget 10000 --as warm-up[/]
      [bold]regraft data select notes.jsonl --target wanted.jsonl --method dsir --budget 5000 --as notes[/]
      [bold]regraft data select faq.jsonl --method perplexity --base smollm2-135m-instruct --as faq \
--set columns.prompt=question --set columns.completion=answer[/]

    Then, in a recipe: [bold]data: {selected: warm-up@1}[/]
    """
    from cli.session import connect_flows, live_progress, resumable
    from cli.train import overrides
    from infra.errors import InvalidInput
    from registry.addresses import adapter_name

    if not name:
        raise InvalidInput("The data set needs a name.", "Give it one with --as NAME.")
    adapter_name(name)
    from infra.documents import parse
    from training.selection.options import PoolSelection, load_selection

    content = load_selection(file) if file else {}
    said = {
        "pool": pool,
        "method": method,
        "budget": budget,
        "share": share,
        "target": target,
        "base": base,
        "deduplicate": deduplicate,
        "decontaminate": decontaminate,
    }
    said = {key: value for key, value in said.items() if value is not None and value != []}
    content |= said
    for key, value in overrides(set_ or []).items():
        if key in said:
            raise InvalidInput(f"{key} is said twice: by an option of its own and with --set.", "Say it once.")
        _put(content, key, value)
    options = parse(PoolSelection, content, str(file) if file else "selection").anchored(Path.cwd())
    connect_flows()  # what needs no server has come first
    from flows.select_rows import select_rows

    with live_progress(), resumable("The selection"):
        selected = select_rows(name, options)
    print_json(selected) if as_json else _tell(selected)


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key."""
    from infra.errors import InvalidInput
    from training.selection.options import source_named

    *parents, last = key.split(".")
    for parent in parents:
        inner = source_named(content.get(parent, {}))
        if isinstance(inner, list):
            raise InvalidInput(f"{key} is none: {parent} is a list.", f"Say all of it: --set '{parent}=[…]'")
        content[parent] = inner if isinstance(inner, dict) else {}
        content = content[parent]
    content[last] = value


def _tell(selected: "SelectedRows") -> None:
    left_out = {
        "cannot be used": selected.unusable,
        "duplicates": selected.duplicates,
        "with a piece of an evaluation set": selected.contaminated,
    }
    again = ", found again: the same choice of the same rows was there already" if selected.again else ""
    console.print(
        f"[bold green]✓[/] [bold]{selected.address}[/]  {selected.rows:,} of {selected.pool:,} rows, "
        f"by {selected.method}{again}"
    )
    for what, number in left_out.items():
        if number:
            console.print(f"[dim]left out: {number:,} {what}[/]")
    for found in selected.evaluation_sets:
        console.print(f"[dim]{escape(found.set)}: a piece of {found.hit:,} of {found.items:,} items was in the pool[/]")
    for warning in selected.warnings:
        console.print(f"[yellow]{escape(warning)}[/]")
    console.print(f"[dim]page: {selected.page}[/]", soft_wrap=True)
    console.print(f"[dim]next, in a recipe: data: {{selected: {selected.address}}}[/]")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Every data set that is kept, newest version first."""
    from registry import AdapterRegistry

    records = AdapterRegistry().datasets()
    if as_json:
        print_json(records)
        return
    rows = [
        (
            f"[bold]{record.address}[/]",
            f"{record.rows:,}",
            f"{record.origin['pool']['rows']:,}",
            record.origin["selection"].get("method", "got-d"),
            size(record.size_bytes),
            ago(record.created_at),
        )
        for record in records
    ]
    show(("data set", ">rows", ">of", "method", ">size", "made"), rows, "No data sets. Make one: regraft data select")


@app.command("show")
def show_(
    address: Annotated[str, typer.Argument(help="NAME@2, or NAME for the newest version.")],
    rows: Annotated[int, typer.Option(min=0, help="How many of its rows to show.")] = 3,
    as_json: Json = False,
) -> None:
    """How a data set was selected, what was trained on it, and some of its rows."""
    from registry import AdapterRegistry

    registry = AdapterRegistry()
    record = registry.dataset(address)
    versions = [version.address for version in registry.trained_on(record.address)]
    folder = registry.materialise_dataset(record.address)
    if as_json:
        print_json({"data_set": record, "versions": versions, "folder": folder})
        return
    dropped = ", ".join(f"{number:,} {why}" for why, number in record.origin["dropped"].items() if number)
    whole = f"{record.rows:,} of {record.origin['pool']['rows']:,}"
    facts(
        [
            ("data set", f"[bold]{record.address}[/]  {ago(record.created_at)}"),
            ("rows", f"{whole}; dropped: {dropped}" if dropped else whole),
            ("fingerprint", record.fingerprint[:16]),
            ("selection", escape(", ".join(f"{key}: {value}" for key, value in record.origin["selection"].items()))),
            ("score", record.origin["score"]),
            ("trained on it", ", ".join(versions) or "nothing yet"),
            ("files", str(folder)),
        ]
    )
    for row in _first_rows(folder, rows):
        console.print(f"\n[dim]{escape(str(row['source']))} row {row['row']}, score {row['score']:.4g}[/]")
        console.print(escape(row.get("text") or f"{row['prompt']}\n→ {row['completion']}"), soft_wrap=True)


def _first_rows(folder: Path, number: int) -> list[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    from flows.data_sets import ROWS

    if not number:
        return []
    with ParquetFile(folder / ROWS) as file:
        return next(file.iter_batches(number)).to_pylist()  # type: ignore[no-any-return]


@app.command("export")
def export(
    address: Annotated[str, typer.Argument(help="NAME@2, or NAME for the newest version.")],
    file: Annotated[Path, typer.Argument(help="Where to write it: .parquet or .jsonl.")],
    as_json: Json = False,
) -> None:
    """Write a data set's rows, scores and all, to a file for other programs."""
    import json
    import shutil

    from pyarrow.parquet import ParquetFile

    from flows.data_sets import ROWS
    from infra.errors import Conflict, InvalidInput, NotFound
    from registry import AdapterRegistry

    if not file.parent.is_dir():
        raise NotFound(f"The folder {file.parent} is not there.", "Make it, or name a file in another one.")
    if file.exists():
        raise Conflict(f"{file} is there already.", "Name another file, or remove it.")
    if file.suffix not in (".parquet", ".jsonl"):
        raise InvalidInput(f"{file.name} is neither .parquet nor .jsonl.", "Give it one of these endings.")
    registry = AdapterRegistry()
    record = registry.dataset(address)
    rows = registry.materialise_dataset(record.address) / ROWS
    partial = file.with_name(f".{file.name}.partial")
    if file.suffix == ".parquet":
        shutil.copyfile(rows, partial)
    else:
        with ParquetFile(rows) as source, partial.open("w", encoding="utf-8") as out:
            for batch in source.iter_batches():
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())
    partial.replace(file)
    if as_json:
        print_json({"data_set": record.address, "rows": record.rows, "file": file})
    else:
        console.print(f"[bold green]✓[/] {record.rows:,} rows of [bold]{record.address}[/] in {file}", soft_wrap=True)
