"""The MLflow run of a training: one run, however often the training was interrupted and went on."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.run_states import mark_crashed
from infra.errors import Interrupted
from infra.settings import get_settings
from registry.tracking import Tracking
from training.checkpoints import checkpoints_directory
from training.progress import TrainingEvent
from training.recipe import Recipe

_SECONDS_BETWEEN_FLUSHES = 3.0  # each is a request, or a transaction
_RUN_FILE = "mlflow_run"
_FLOW_RUN = "regraft.flow_run"


class MlflowRun:
    """A run that is open. `id` names it in MLflow."""

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self.id = run_id
        self._tracking = tracking
        self._points: list[tuple[int, dict[str, float]]] = []
        self._flushed = time.monotonic()

    def log(self, event: TrainingEvent) -> None:
        """Keep the numbers of a step; MLflow hears of them every few seconds."""
        metrics = {
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "tokens_per_second": event.tokens_per_second,
        }
        if event.validation_loss is not None:
            metrics["validation_loss"] = event.validation_loss
        self._points.append((event.step, metrics))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Send what was kept."""
        if self._points:
            self._tracking.log_series(self.id, self._points)
        self._points, self._flushed = [], time.monotonic()

    def attach(self, directory: Path) -> None:
        """Copy a directory's files to the run."""
        self._tracking.log_artifacts(self.id, directory)


@contextmanager
def mlflow_run(recipe: Recipe, tags: Mapping[str, str], flow_run_id: str, workdir: Path) -> Iterator[MlflowRun]:
    """The run of the training in `workdir`: a new one in the adapter's experiment, or the interrupted one again.

    The flow run that began it is over then, even if it was killed and Prefect does not know.

    Args:
        recipe: its content becomes the run's parameters.
        tags: of the run, beside that of the flow run.
        flow_run_id: the flow run that trains now.
        workdir: of this training, in which no other process is at work.
    """
    tags = {**tags, _FLOW_RUN: flow_run_id}
    tracking = Tracking(get_settings())
    remembered = checkpoints_directory(workdir) / _RUN_FILE  # forgotten when the checkpoints are
    run_id = remembered.read_text(encoding="utf-8") if remembered.is_file() else None
    if run_id is None or not tracking.reopen(run_id):
        name = f"{recipe.method.name} {recipe.digest}"
        run_id = tracking.start_run(recipe.adapter, name=name, tags=tags, params=_flat(recipe.as_stored()))
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(run_id, encoding="utf-8")
    else:
        if earlier := tracking.tags(run_id).get(_FLOW_RUN):
            mark_crashed(earlier, f"Its process was killed; flow run {flow_run_id} goes on with the training.")
        tracking.set_tags(run_id, tags)
    run = MlflowRun(tracking, run_id)
    try:
        yield run
        run.flush()
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, Interrupted)
        tracking.finish(run_id, "FAILED" if failed else "KILLED")
        raise
    tracking.finish(run_id)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
