"""`regraft db` and `regraft fsck`: the registry's own health."""

from typing import Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, errors, print_json, show

app = typer.Typer(help="The registry's database: its revision, upgrade, downgrade.", no_args_is_help=True)


@app.command("current")
def current() -> None:
    """The database's revision, and the one that this Regraft wants."""
    from infra.database import create_engine
    from infra.settings import get_settings
    from registry.schema import current_revision, head_revision

    engine = create_engine(get_settings())
    console.print(f"database {current_revision(engine) or 'empty'}, this Regraft {head_revision()}")


@app.command("upgrade")
def upgrade() -> None:
    """Bring the database to the revision that this Regraft wants. Back it up first."""
    from infra.database import create_engine
    from infra.settings import get_settings
    from registry.schema import current_revision
    from registry.schema import upgrade as upgrade_schema

    engine = create_engine(get_settings())
    before = current_revision(engine)
    upgrade_schema(engine)
    console.print(f"{before or 'empty'} → {current_revision(engine)}")


@app.command("downgrade")
def downgrade(revision: Annotated[str, typer.Argument(help="A revision, or 'base' to drop every table.")]) -> None:
    """Take the database back to an older revision. Columns and tables that came later are lost."""
    from alembic.util import CommandError

    from infra.database import create_engine
    from infra.errors import InvalidInput
    from infra.settings import get_settings
    from registry.schema import current_revision
    from registry.schema import downgrade as downgrade_schema

    engine = create_engine(get_settings())
    before = current_revision(engine)
    typer.confirm(f"Downgrade from {before} to {revision}, losing what came later?", abort=True)
    try:
        downgrade_schema(engine, revision)
    except CommandError as error:
        raise InvalidInput(f"{error}.", "See: regraft db current") from None
    console.print(f"{before} → {current_revision(engine) or 'empty'}")


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
