"""`regraft study`: blinded answers for people to rate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, print_json, show

if TYPE_CHECKING:
    from training.evaluation.reader_study import Design

app = typer.Typer(
    help="Reader studies: people rate answers of several versions without knowing whose they are.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="The study's folder.")]


@app.command("create")
def create(
    folder: Annotated[Path, typer.Argument(help="A new folder; the same command again goes on in it.")],
    versions: Annotated[list[str] | None, typer.Argument(help="NAME@VERSION or NAME@ALIAS, one an arm.")] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="An arm whose answers are there: columns prompt and answer."),
    ] = None,
    reference: Annotated[bool, typer.Option("--reference", help="The data's own answers are one more arm.")] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Items: a file with a column prompt, and completion for --reference.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Items of a built-in task. Default: the first version's own test data.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Items of a suite file: NAME of suites/NAME.yaml, or a path to a .yaml file.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="At most so many items.")] = 30,
    design: Annotated[
        Path | None, typer.Option(help="YAML: title, instructions, criteria (name, question, low, high).")
    ] = None,
    readers: Annotated[int | None, typer.Option(min=1, max=99, help="Packets; 3 unless told.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of a version, in tokens.")] = 256,
    as_json: Json = False,
) -> None:
    """Let two or more arms answer, and make a packet for each reader: a form for the browser, and a table.

    Give readers their folder of FOLDER/packets and nothing else.

    Examples:
      [bold]regraft study create summaries summary@3 summary@4 --reference[/]
      [bold]regraft study create summaries summary@4 --answers other=other.jsonl --prompts notes.jsonl --readers 5[/]
    """
    from infra.errors import InvalidInput

    files = dict(_named(each) for each in answers or [])
    if len(files) < len(answers or []):
        raise InvalidInput("Two files of answers have the same name.", "Name each arm once.")
    decided = _design(design, readers)
    if versions:
        from cli.session import connect_flows, live_progress, resumable
        from registry import AdapterRegistry

        for address in versions:
            AdapterRegistry().get(address)
        connect_flows()  # what needs no server has come first
    from flows.study import Arms, create_study, make_study

    arms = Arms(
        versions=tuple(versions or ()),
        answers=files,
        prompts=prompts,
        task=task,
        suite=suite,
        items=items,
        reference=reference,
        max_new_tokens=max_new_tokens,
    )
    if versions:
        with live_progress(), resumable("The study"):
            made = create_study(folder, decided, arms)
    else:
        made = make_study(folder, decided, arms)
    if as_json:
        print_json(made)
        return
    state = "is there already, as it was made" if made.already else "is made"
    console.print(f"[bold green]✓[/] the study of {made.items} items and {len(made.arms)} arms {state}")
    if made.alike:
        console.print(f"[yellow]To {made.alike} of the items all arms gave the same answer.[/]")
    for packet in made.packets:
        console.print(f"  {escape(str(packet))}", soft_wrap=True)
    console.print(f"[dim]→[/] regraft study collect {escape(str(folder))} RETURNED.csv …", soft_wrap=True)


@app.command("collect")
def collect(
    folder: Folder,
    files: Annotated[list[Path], typer.Argument(help="What readers returned, all of it at once: one CSV each.")],
    partial: Annotated[
        bool, typer.Option("--partial", help="Take packets with empty cells, and do without those not returned.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check returned packets and keep their ratings, still blind; where anything is wrong, nothing is kept.

    Example: [bold]regraft study collect summaries ratings-reader-1.csv ratings-reader-2.csv ratings-reader-3.csv[/]
    """
    from flows.study import collect_study

    study, ratings = collect_study(folder, files, partial)
    if as_json:
        print_json({"answers": len(ratings.by_id), "missing": ratings.missing, "absent": ratings.absent})
        return
    readers = f"{len(ratings.missing)} of {study.design.readers} readers"
    console.print(f"[bold green]✓[/] {len(ratings.by_id)} rated answers of {readers}")
    for reader, missing in ratings.missing.items():
        if missing:
            console.print(f"[yellow]Reader {reader}: {missing} ratings or marks are missing.[/]")
    if ratings.absent:
        console.print(f"[yellow]Not returned: reader {', '.join(map(str, ratings.absent))}.[/]")


@app.command("analyse")
def analyse(folder: Folder, as_json: Json = False) -> None:
    """Unblind: means, wins, paired tests with correction, agreement; also as findings.json and findings.html."""
    from flows.study import analyse_study

    found = analyse_study(folder)
    if as_json:
        print_json(found)
        return
    show(
        ("measure", "arm", ">mean", ">95 %"),
        [(m.measure, escape(m.arm), f"{m.value:.2f}", f"{m.low:.2f}–{m.high:.2f}") for m in found.means],
        "No ratings.",
    )
    console.print()
    show(
        ("measure", "~first against second", ">difference", "+>95 %", "+>better, worse, even", ">p, corrected"),
        [
            (
                d.measure,
                f"{escape(d.first)} – {escape(d.second)}",
                f"{d.difference:+.2f}",
                f"{d.low:+.2f} to {d.high:+.2f}",
                f"{d.wins}, {d.losses}, {d.ties}",
                f"[bold]{d.corrected:.3g}[/]" if d.corrected < 0.05 else f"{d.corrected:.3g}",
            )
            for d in found.differences
        ],
        "Nothing to compare.",
    )
    console.print()
    show(
        ("agreement", ">Krippendorff's α", ">same"),
        [
            (
                a.measure,
                "–" if a.alpha is None else f"{a.alpha:.2f}",
                "–" if a.same is None else f"{100 * a.same:.0f} %",
            )
            for a in found.agreement
        ],
        "No ratings.",
    )
    for warning in found.warnings:
        console.print(f"[yellow]{escape(warning)}[/]")
    console.print(f"[dim]→[/] {escape(str(folder / 'findings.html'))}", soft_wrap=True)


def _named(told: str) -> tuple[str, Path]:
    from infra.errors import InvalidInput

    name, sign, file = told.partition("=")
    if not (name and sign and file):
        raise InvalidInput(f"'{told}' is not NAME=FILE.", "E.g. --answers other=other.jsonl")
    return name, Path(file)


def _design(file: Path | None, readers: int | None) -> "Design":
    from infra.documents import parse, read_yaml
    from training.evaluation.reader_study import Design

    content = read_yaml(file) if file else {}
    return parse(Design, content if readers is None else content | {"readers": readers}, str(file or "design"))
