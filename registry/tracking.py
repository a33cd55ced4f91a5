"""The MLflow side: an experiment per adapter, a run per training, registered models and versions, mirrored aliases.

Everything goes through one `MlflowClient`; no global (fluent) state is touched, so that threads and flows do not meet.
MLflow is imported at the first call: it takes seconds.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from infra.errors import ServiceUnavailable
from infra.redaction import redacted_url, without_secrets
from infra.settings import Settings

UID_TAG = "regraft.uid"
_METRICS_A_BATCH = 1000  # MLflow's limits
_PARAMS_A_BATCH = 100
_PARAM_LENGTH = 6000
_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^@\s]+@")  # a server's error may quote a URL of its own


def artifact_source(artifact_sha256: str) -> str:
    """What a model version names as its source: the content, wherever the store keeps it.

    Not the store's own URL: an MLflow server refuses folders outside its runs, and a store may move.
    """
    return f"regraft:/artifacts/{artifact_sha256}"


class Tracking:
    """Runs and registered models in the MLflow of the settings. Raises `ServiceUnavailable` when it does not answer."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def _client(self) -> Any:
        from infra.mlflow_client import mlflow_client

        return mlflow_client(self._settings)

    # ---- runs

    def start_run(
        self, adapter: str, *, name: str | None = None, tags: Mapping[str, str], params: Mapping[str, object]
    ) -> str:
        """Begin a run in the adapter's experiment `regraft/ADAPTER`; returns its id."""
        with self._explained("start a run"):
            run_id: str = self._client.create_run(self._experiment(adapter), tags=dict(tags), run_name=name).info.run_id
            self._log_params(run_id, params)
            return run_id

    def reopen(self, run_id: str) -> bool:
        """Let a run that had ended, or whose process died, go on; False if it is not there any more."""
        from mlflow.exceptions import MlflowException

        with self._explained("reopen a run"):
            try:
                if self._client.get_run(run_id).info.lifecycle_stage == "deleted":
                    return False
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return False
                raise
            self._client.update_run(run_id, status="RUNNING")
            return True

    def tags(self, run_id: str) -> dict[str, str]:
        """The tags of a run."""
        with self._explained("read a run"):
            return dict(self._client.get_run(run_id).data.tags)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Add tags to a run, or replace them."""
        from mlflow.entities import RunTag

        with self._explained("tag a run"):
            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step."""
        self.log_series(run_id, [(step, metrics)])

    def log_series(self, run_id: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log numbers of several steps, in as few requests as MLflow allows."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        entities = [Metric(key, float(value), now, step) for step, metrics in points for key, value in metrics.items()]
        with self._explained("log metrics"):
            for batch in _batches(entities, _METRICS_A_BATCH):
                self._client.log_batch(run_id, metrics=batch)

    def log_artifacts(self, run_id: str, directory: Path) -> None:
        """Copy a directory's files (plots, reports, the recipe) to the run."""
        with self._explained("log artifacts"):
            self._client.log_artifacts(run_id, str(directory))

    def finish(self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End a run."""
        with self._explained("end a run"):
            self._client.set_terminated(run_id, status)

    # ---- model versions, known by the uid of ours

    def ensure_version(
        self, adapter: str, uid: str, *, source: str, run_id: str | None, tags: Mapping[str, str]
    ) -> int:
        """MLflow's number of the model version with that uid; created if it is not there."""
        with self._explained("record a model version"):
            self._ensure_model(adapter)
            known = self._versions(adapter).get(uid)
            if known is not None:
                return known
            created = self._client.create_model_version(
                adapter, source=source, run_id=run_id, tags={**tags, UID_TAG: uid}, await_creation_for=0
            )
            return int(created.version)

    def versions(self, adapter: str) -> dict[str, int]:
        """Uid → MLflow's number, for every model version that a registry of ours made."""
        with self._explained("list model versions"):
            return self._versions(adapter)

    def delete_version(self, adapter: str, uid: str) -> bool:
        """Delete the model version with that uid; False if there was none."""
        with self._explained("delete a model version"):
            number = self._versions(adapter).get(uid)
            if number is None:
                return False
            self._client.delete_model_version(adapter, str(number))
            return True

    # ---- aliases

    def aliases(self, adapter: str) -> dict[str, int]:
        """Alias → MLflow's number of the version it points at."""
        with self._explained("read aliases"):
            model = self._model(adapter)
            return {} if model is None else {alias: int(number) for alias, number in model.aliases.items()}

    def set_alias(self, adapter: str, alias: str, version: int) -> None:
        """Point MLflow's copy of the alias at MLflow's number `version`."""
        with self._explained("move an alias"):
            self._client.set_registered_model_alias(adapter, alias, str(version))

    def delete_alias(self, adapter: str, alias: str) -> None:
        """Remove MLflow's copy of an alias."""
        with self._explained("remove an alias"):
            self._client.delete_registered_model_alias(adapter, alias)

    # ----

    def _experiment(self, adapter: str) -> str:
        from mlflow.exceptions import MlflowException

        name = f"regraft/{adapter}"
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)  # another process was quicker
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _log_params(self, run_id: str, params: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in params.items()]
        for batch in _batches(entities, _PARAMS_A_BATCH):
            self._client.log_batch(run_id, params=batch)

    def _model(self, adapter: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(adapter)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _ensure_model(self, adapter: str) -> None:
        from mlflow.exceptions import MlflowException

        if self._model(adapter) is None:
            try:
                self._client.create_registered_model(adapter, tags={"regraft": "adapter"})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def _versions(self, adapter: str) -> dict[str, int]:
        found: dict[str, int] = {}
        token = None
        while True:
            page = self._client.search_model_versions(f"name = '{adapter}'", max_results=1000, page_token=token)
            found |= {version.tags[UID_TAG]: int(version.version) for version in page if UID_TAG in version.tags}
            token = page.token
            if not token:
                return found

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        uri = self._settings.tracking_uri
        try:
            yield
        except Exception as error:
            from mlflow.exceptions import MlflowException

            if not isinstance(error, MlflowException):
                raise
            reason = _PASSWORD.sub(r"\1***@", without_secrets(" ".join(str(error).split())[:500], uri))
            raise ServiceUnavailable(
                f"MLflow at {redacted_url(uri)} could not {doing}: {reason}", "See what is wrong with: regraft doctor"
            ) from None


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
