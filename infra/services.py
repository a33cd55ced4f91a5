"""The servers Regraft works with: local ones that start on demand and are re-used, or remote ones by setting."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from infra.environment import (
    inherited_environment,
    is_remote,
    mlflow_server_environment,
    prefect_home,
    prefect_server_environment,
)
from infra.errors import ServiceUnavailable
from infra.http import answers
from infra.process import BackgroundServer, ProcessRecord
from infra.redaction import redacted_url
from infra.settings import Settings

PREFECT_PORT = 4200
MLFLOW_PORT = 5000

ServiceName = Literal["prefect", "mlflow"]


@dataclass(frozen=True)
class Service:
    """Where a server is and how it does.

    Attributes:
        name: `prefect` or `mlflow`.
        state: `running` (it answers), `starting` (its process lives, but does not answer yet), `stopped` (local; the
            next command that needs it starts it) or `unreachable` (remote, and it does not answer).
        url: its web page, without credentials; None while there is none.
        remote: whether it is somebody else's to start and stop.
        pid: of the local process.
        port: of the local process.
        started_at: of the local process, with timezone.
    """

    name: ServiceName
    state: Literal["running", "starting", "stopped", "unreachable"]
    url: str | None
    remote: bool = False
    pid: int | None = None
    port: int | None = None
    started_at: datetime | None = None

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return self.state == "running"


class LocalServices:
    """The Prefect and the MLflow server of one `Settings`.

    Each runs on 127.0.0.1, survives the command that started it, and is found again by every later one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._prefect = _prefect_server(settings)
        self._mlflow = _mlflow_server(settings)

    def prefect(self) -> Service:
        """The Prefect server, started if need be.

        Raises:
            ServiceUnavailable: it did not start, or the remote one of the settings does not answer.
        """
        if self._settings.prefect_api_url is not None:
            return _required(self._remote_prefect(self._settings.prefect_api_url), "prefect_api_url")
        return _local("prefect", self._prefect.ensure(), "running")

    def prefect_api_url(self) -> str:
        """The address for Prefect's client, credentials included; the server is started if need be.

        Raises:
            ServiceUnavailable: as `prefect`.
        """
        server = self.prefect()
        return self._settings.prefect_api_url or f"{server.url}/api"

    def last_prefect_api_url(self) -> str | None:
        """Where the local Prefect server is, or was when it last ran; None if it never did."""
        record = self._prefect.remembered()
        return None if record is None else f"http://127.0.0.1:{record.port}/api"

    def mlflow(self) -> Service:
        """The MLflow server with its pages, over the same store that `mlflow_client` opens; started if need be.

        Raises:
            ServiceUnavailable: it did not start, or the remote one of the settings does not answer.
        """
        if is_remote(self._settings.tracking_uri):
            return _required(self._remote_mlflow(), "mlflow_tracking_uri")
        return _local("mlflow", self._mlflow.ensure(), "running")

    def up(self) -> list[Service]:
        """Both servers, started side by side if need be.

        Raises:
            ServiceUnavailable: one of them did not start or does not answer.
        """
        with ThreadPoolExecutor(2) as pool:
            pending = [pool.submit(self.prefect), pool.submit(self.mlflow)]
        return [future.result() for future in pending]

    def status(self) -> list[Service]:
        """What runs where. Starts nothing."""
        remote = self._settings.prefect_api_url
        return [
            self._remote_prefect(remote) if remote is not None else self._inspected("prefect", self._prefect),
            self._remote_mlflow()
            if is_remote(self._settings.tracking_uri)
            else self._inspected("mlflow", self._mlflow),
        ]

    def down(self) -> list[ServiceName]:
        """Stop the local servers and all that they spawned; the names of those that were there to stop."""
        servers: list[tuple[ServiceName, BackgroundServer]] = [("prefect", self._prefect), ("mlflow", self._mlflow)]
        with ThreadPoolExecutor(2) as pool:
            stopped = list(pool.map(lambda item: item[1].stop(), servers))
        return [name for (name, _), was_there in zip(servers, stopped, strict=True) if was_there]

    def _remote_prefect(self, api_url: str) -> Service:
        url = api_url.rstrip("/")
        up = answers(f"{url}/health")
        return Service(
            "prefect", "running" if up else "unreachable", redacted_url(url).removesuffix("/api"), remote=True
        )

    def _remote_mlflow(self) -> Service:
        url = self._settings.tracking_uri.rstrip("/")
        up = not url.startswith("http") or answers(f"{url}/health")  # Databricks' own addresses resolve in its client
        return Service("mlflow", "running" if up else "unreachable", redacted_url(url), remote=True)

    def _inspected(self, name: ServiceName, server: BackgroundServer) -> Service:
        record = server.find()
        if record is None:
            return Service(name, "stopped", None)
        return _local(name, record, "running" if server.answers(record) else "starting")


def _required(service: Service, setting: str) -> Service:
    if service.running:
        return service
    raise ServiceUnavailable(
        f"The {service.name} server at {service.url} does not answer.",
        f"Check that it runs and that {setting} in regraft.toml or REGRAFT_{setting.upper()} is right; "
        "without that setting a local server is started.",
    )


def _local(name: ServiceName, record: ProcessRecord, state: Literal["running", "starting"]) -> Service:
    url = f"http://127.0.0.1:{record.port}"
    return Service(name, state, url, pid=record.pid, port=record.port, started_at=record.started_at)


def _prefect_server(settings: Settings) -> BackgroundServer:
    def environment(port: int) -> dict[str, str]:
        prefect_home(settings).mkdir(parents=True, exist_ok=True)
        return {**inherited_environment(), **prefect_server_environment(settings, port)}

    return BackgroundServer(
        name="prefect",
        directory=settings.services,
        first_port=PREFECT_PORT,
        health="/api/health",
        command=lambda port: ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        environment=environment,
    )


def _mlflow_server(settings: Settings) -> BackgroundServer:
    def environment(_port: int) -> dict[str, str]:
        from infra.mlflow_client import prepare_store  # brings SQLAlchemy along; rarely needed here

        return {**inherited_environment(), **mlflow_server_environment(settings, prepare_store(settings))}

    def command(port: int) -> list[str]:
        # The stores come from the environment. Artifacts are read from where the in-process client wrote them.
        where = ["--host", "127.0.0.1", "--port", str(port)]
        return [
            "-m",
            "mlflow",
            "server",
            *where,
            "--workers=1",
            "--no-serve-artifacts",
            "--uvicorn-opts=--log-level=warning",
        ]

    return BackgroundServer(
        name="mlflow",
        directory=settings.services,
        first_port=MLFLOW_PORT,
        health="/health",
        command=command,
        environment=environment,
    )
