"""What a training tells while it runs, and what it was when it is over."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainingEvent:
    """One optimiser update, or one validation after it.

    Args:
        step: optimiser updates done.
        total_steps: of the whole training, should it not stop early.
        loss: mean over everything judged in this update, on all processes.
        learning_rate: of this update.
        tokens_per_second: read by the model, all processes together, since the training was started or resumed.
        eta_seconds: to the last step, at the pace so far.
        validation_loss: mean over the validation data; only in the event of a validation.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    eta_seconds: float
    validation_loss: float | None = None


OnEvent = Callable[[TrainingEvent], None]
OnPreparing = Callable[[str, int, int], None]  # stage, done, total


@dataclass(slots=True)
class Progress:
    """What a training has behind it, interruptions included; stored in each checkpoint.

    Args:
        losses: (step, loss) of each update.
        validation_losses: (step, loss) of each validation.
        seconds: of work, without the time between an interruption and its resumption.
        labelled_tokens: how many things the loss judged.
        tokens: how many positions the model read, padding not counted.
        bad_validations: how many validations ago the best one was.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    labelled_tokens: int = 0
    tokens: int = 0
    bad_validations: int = 0

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest validation loss, the earliest of equal ones."""
        return min(self.validation_losses, key=lambda pair: (pair[1], pair[0]), default=None)

    def as_stored(self) -> dict[str, Any]:
        """Plain JSON values; `Progress.stored` of it is this progress."""
        return asdict(self)

    @classmethod
    def stored(cls, content: dict[str, Any]) -> "Progress":
        """Exact inverse of `as_stored`."""
        pairs = {name: [(int(step), float(loss)) for step, loss in content[name]] for name in _PAIRS}
        return cls(**{**content, **pairs})


_PAIRS = ("losses", "validation_losses")


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """A finished training. The adapter that was trained is in the model.

    Args:
        steps: optimiser updates done.
        losses: (step, loss) of each.
        validation_losses: (step, loss) of each validation.
        seconds: of work, interrupted parts together.
        labelled_tokens: how many things the loss judged.
        tokens: how many positions the model read, padding not counted.
        stopped_early: whether the validation loss ended it.
        best_step: the step whose tensors were restored at the end; None where the last ones were kept.
        resumed_from: the step of the checkpoint that this process started from, or None.
        peak_memory_bytes: of this process: allocated on the GPU, or resident where it trained on the CPU.
    """

    steps: int
    losses: tuple[tuple[int, float], ...]
    validation_losses: tuple[tuple[int, float], ...]
    seconds: float
    labelled_tokens: int
    tokens: int
    stopped_early: bool
    best_step: int | None
    resumed_from: int | None
    peak_memory_bytes: int

    def as_stored(self) -> dict[str, Any]:
        """Plain JSON values; `TrainingOutcome.stored` of it is this outcome."""
        return asdict(self)

    @classmethod
    def stored(cls, content: dict[str, Any]) -> "TrainingOutcome":
        """Exact inverse of `as_stored`."""
        pairs = {name: tuple((int(step), float(loss)) for step, loss in content[name]) for name in _PAIRS}
        return cls(**{**content, **pairs})
