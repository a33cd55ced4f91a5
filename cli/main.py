"""The `regraft` command. Command modules import what is heavy only when they run, so that help is instant."""

import errno
import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from cli import (
    adapters,
    base,
    compress,
    curve,
    data,
    database,
    demo,
    evaluate,
    federate,
    generate,
    kit,
    leaderboard,
    lineage,
    merge,
    methods,
    migrate,
    promote,
    schedule,
    services,
    study,
    tasks,
    train,
    transfer,
)
from cli.console import errors
from cli.quiet import quieten
from infra.errors import RegraftError

app = typer.Typer(
    name="regraft",
    help="The whole life of a fine-tuned adapter: train, judge, promote, use.",
    epilog="First time here? Try: regraft demo. Something odd? Try: regraft doctor.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    pretty_exceptions_enable=False,
)

WORK = "Train and use"
LIFE = "Registry and promotion"
RUN = "Schedules and services"

app.command("demo", rich_help_panel=WORK)(demo.demo)
app.command("train", rich_help_panel=WORK)(train.train)
app.command("federate", rich_help_panel=WORK)(federate.federate)
app.command("evaluate", rich_help_panel=WORK)(evaluate.evaluate)
app.command("curve", rich_help_panel=WORK)(curve.curve)
app.add_typer(study.app, name="study", rich_help_panel=WORK)
app.command("generate", rich_help_panel=WORK)(generate.generate)
app.add_typer(data.app, name="data", rich_help_panel=WORK)
app.add_typer(methods.app, name="methods", rich_help_panel=WORK)
app.add_typer(tasks.app, name="tasks", rich_help_panel=WORK)
app.add_typer(adapters.app, name="adapters", rich_help_panel=LIFE)
app.command("lineage", rich_help_panel=LIFE)(lineage.lineage)
app.command("leaderboard", rich_help_panel=LIFE)(leaderboard.leaderboard)
app.command("promote", rich_help_panel=LIFE)(promote.promote)
app.command("migrate", rich_help_panel=LIFE)(migrate.migrate)
app.command("compress", rich_help_panel=LIFE)(compress.compress)
app.command("merge", rich_help_panel=LIFE)(merge.merge)
app.command("rollback", rich_help_panel=LIFE)(promote.rollback)
app.add_typer(base.app, name="base", rich_help_panel=LIFE)
app.add_typer(kit.app, name="kit", rich_help_panel=LIFE)
app.command("export", rich_help_panel=LIFE)(transfer.export)
app.command("import", rich_help_panel=LIFE)(transfer.import_)
app.command("check", rich_help_panel=LIFE)(transfer.check)
app.command("fsck", rich_help_panel=LIFE)(database.fsck)
app.add_typer(database.app, name="db", rich_help_panel=LIFE)
app.add_typer(schedule.app, name="schedule", rich_help_panel=RUN)
app.command("worker", rich_help_panel=RUN)(schedule.worker)
app.command("up", rich_help_panel=RUN)(services.up)
app.command("down", rich_help_panel=RUN)(services.down)
app.command("status", rich_help_panel=RUN)(services.status)
app.command("doctor", rich_help_panel=RUN)(services.doctor)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"regraft {version('regraft')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one-message errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Options that come before the command."""
    del version
    if debug:
        os.environ["REGRAFT_DEBUG"] = "1"
    if not _debugging():
        quieten()


def main() -> None:
    """Run the command line; an error is one message and a non-zero exit code, never a traceback (but `--debug`)."""
    try:
        try:
            app(prog_name="regraft")
        finally:
            sys.stdout.flush()
    except SystemExit as leaving:
        if leaving.code == 130:  # what Typer makes of Ctrl-C
            errors.print("Stopped.")
        raise
    except BrokenPipeError:  # the reader of a pipe has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if _debugging():
            raise
        sys.exit(_told(error))


def _told(error: Exception) -> int:
    """Print what happened and what to do about it; returns the exit code."""
    match error:
        case RegraftError():
            what, remedy, code = error.what, error.remedy, error.exit_code
        case _ if type(error).__module__.startswith("httpx"):  # Prefect's client is the one that speaks by it
            what = f"The Prefect server stopped answering: {error}"
            remedy, code = "regraft status; then run the same command again: a training goes on from its checkpoint.", 8
        case OSError(filename=str(file)) if error.strerror:  # the machine's fault, not ours
            what, remedy, code = f"{file}: {error.strerror}.", _REMEDIES.get(error.errno or 0, "regraft doctor"), 1
        case OSError() if error.strerror and error.errno in _REMEDIES:  # a write, which does not know its file's name
            what, remedy, code = f"{error.strerror}.", _REMEDIES[error.errno], 1
        case _:
            what = f"Unexpected {type(error).__name__}: {error}"
            remedy, code = "This is a bug in Regraft. See all of it with: regraft --debug …", 70
    errors.print(f"[bold red]✗[/] {escape(what)}", soft_wrap=True)
    if remedy:
        errors.print(f"  [dim]→[/] {escape(remedy)}", soft_wrap=True)
    return code


_OWNERSHIP = "Mend its owner and mode, or choose another place with REGRAFT_HOME."
_REMEDIES = {
    errno.ENOSPC: "Free some space on that disk and run the same command again.",
    errno.EDQUOT: "Your quota on that disk is used up: free some space and run the same command again.",
    errno.EACCES: _OWNERSHIP,
    errno.EPERM: _OWNERSHIP,
    errno.EROFS: _OWNERSHIP,
    errno.ENOTDIR: _OWNERSHIP,
}


def _debugging() -> bool:
    return bool(os.environ.get("REGRAFT_DEBUG"))
