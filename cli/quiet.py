"""A terminal that shows what the command has to say, and nothing of what the packages under it say to developers."""

import logging
import os
import sys
import warnings

from rich.markup import escape

from cli.console import errors

_FLOW_LOGS = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
_QUIET = {
    _FLOW_LOGS: "CRITICAL",  # a flow's error reaches the user once, as our message
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",  # its threads' tracebacks while a server is away
    "PYTHONWARNINGS": "ignore",  # in the processes of a data-parallel training
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # stages have bars of their own: cli.session.live_progress
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns of every fork
}
_OURS = ("flows", "infra", "registry", "serving", "training")


def quieten() -> None:
    """Silence bars, logs and warnings of other packages; show the warnings that Regraft itself logs as notices.

    Call it before they are imported. What the user's environment or `python -W` says already stays.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger().addHandler(_nothing)
    logging.raiseExceptions = False  # "--- Error logging to API ---", for every line while a server is away
    for package in _OURS:
        logging.getLogger(package).addHandler(_notices)


def outspoken_environment() -> dict[str, str]:
    """The environment for a child process whose flows' logs, but not its packages' bars, the user wants to see."""
    return {name: value for name, value in os.environ.items() if name != _FLOW_LOGS or value != _QUIET[_FLOW_LOGS]}


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        errors.print(f"[yellow]![/] {escape(record.getMessage())}", soft_wrap=True)


_nothing = logging.NullHandler()  # takes the place of Python's handler of last resort
_notices = _Notices(logging.WARNING)
