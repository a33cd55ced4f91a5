"""`regraft db` and `regraft fsck`: the registry's own health."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, errors, print_json, show

if TYPE_CHECKING:
    from sqlalchemy import Engine

app = typer.Typer(help="The registry's database: its revision, upgrade, downgrade.", no_args_is_help=True)


@app.command("current")
def current(as_json: Json = False) -> None:
    """The database's revision, and the one that this Regraft wants."""
    from registry.schema import current_revision, head_revision

    with _engine() as engine:
        at = current_revision(engine)
    if as_json:
        print_json({"database": at, "head": head_revision()})
    else:
        console.print(f"database {at or 'empty'}, this Regraft {head_revision()}")


@app.command("upgrade")
def upgrade() -> None:
    """Bring the database to the revision that this Regraft wants. Back it up first."""
    from registry.schema import current_revision
    from registry.schema import upgrade as upgrade_schema

    with _engine() as engine:
        before = current_revision(engine)
        upgrade_schema(engine)
        console.print(f"{before or 'empty'} → {current_revision(engine)}")


@app.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="A revision, or 'base' to drop every table.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take the database back to an older revision. Columns and tables that came later are lost."""
    from registry.schema import current_revision, require_revision
    from registry.schema import downgrade as downgrade_schema

    require_revision(revision)
    with _engine() as engine:
        before = current_revision(engine)
        if not yes:
            typer.confirm(f"Downgrade from {before} to {revision}, losing what came later?", abort=True)
        downgrade_schema(engine, revision)
        console.print(f"{before} → {current_revision(engine) or 'empty'}")


@contextmanager
def _engine() -> "Iterator[Engine]":
    """The registry's database; what is wrong with it as such is told in a sentence."""
    from infra.database import create_engine, errors_explained
    from infra.settings import get_settings

    settings = get_settings()
    with errors_explained(settings.registry_url):
        yield create_engine(settings)


def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is found.")] = False,
    from_: Annotated[str | None, typer.Option("--from", help="Another store to fetch damaged files from.")] = None,
    adopt_mlflow: Annotated[
        bool, typer.Option("--adopt-mlflow", help="Aliases moved by hand in MLflow win. Default: ours are restored.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not re-read every artifact.")] = False,
    as_json: Json = False,
) -> None:
    """Check that tables, artifact store and MLflow agree, byte for byte; with --repair, make them.

    Exit code 1 where something is wrong and was not mended.

    Examples:
      [bold]regraft fsck[/]
      [bold]regraft fsck --repair --from s3://backup/adapters[/]
    """
    from infra.settings import get_settings
    from registry import AdapterRegistry
    from registry.artifacts import open_artifact_store

    settings = get_settings()
    source = open_artifact_store(settings.model_copy(update={"artifact_store": from_})) if from_ else None
    with errors.status("checking"):
        findings = AdapterRegistry(settings).fsck(
            repair=repair, source=source, adopt_mlflow=adopt_mlflow, deep=not quick
        )
    if as_json:
        print_json(findings)
    else:
        rows = [
            ("[green]mended[/]" if f.repaired else "[red]open[/]", f.subject, escape(f.problem), escape(f.repair))
            for f in findings
        ]
        show(("", "~what", "~problem", "~repair"), rows, "Everything agrees.")
    if any(not finding.repaired for finding in findings):
        raise typer.Exit(1)
