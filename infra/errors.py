"""The project's own few errors. Each says what happened, to which thing, and what to do about it."""


class RegraftError(Exception):
    """An error meant for the person at the keyboard.

    Args:
        what: what happened and to which thing, one sentence, no secrets.
        remedy: what to do about it; a command where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n{self.remedy}" if self.remedy else self.what


class InvalidInput(RegraftError):
    """A recipe, option, data set or file that cannot be used as it is."""

    exit_code = 2


class NotFound(RegraftError):
    """A named thing (adapter, version, alias, base model, file, task) that is not there."""

    exit_code = 3


class Conflict(RegraftError):
    """Somebody else got there first, or the thing exists already with another content."""

    exit_code = 4


class CorruptArtifact(RegraftError):
    """Bytes that are not what was registered, or a file that must not be trusted."""

    exit_code = 5


class BaseModelMismatch(RegraftError):
    """An adapter meets a base model whose identity is not the one it was trained on."""

    exit_code = 6


class GateRefused(RegraftError):
    """A promotion that its policy does not allow."""

    exit_code = 7


class ServiceUnavailable(RegraftError):
    """A server (Prefect, MLflow, S3, database) that does not answer, or a database at another revision."""

    exit_code = 8


class NotMergeable(RegraftError):
    """A method whose update cannot be folded into the base weights."""

    exit_code = 2


class Interrupted(RegraftError):
    """The user stopped a resumable piece of work; nothing was registered."""

    exit_code = 130
