"""What `regraft doctor` looks at: is this machine, with these settings, fit for work?"""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from infra.environment import is_remote
from infra.errors import RegraftError
from infra.redaction import redacted_url, without_secrets
from infra.services import LocalServices
from infra.settings import Settings, configuration_file

WARN_BYTES = 5 * 2**30
PROBLEM_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what it is about, e.g. `disk`.
        level: `ok`; `warning`: works, but not as well as it could; `problem`: something will fail.
        message: what was found, one sentence, no secrets.
        remedy: what to do about it; a command where there is one; empty when all is well.
    """

    subject: str
    level: Literal["ok", "warning", "problem"]
    message: str
    remedy: str = ""


def machine_findings(settings: Settings) -> list[Finding]:
    """Every check, in the order a reader wants them. Starts nothing and creates no database."""
    return [
        check_python(),
        check_torch(),
        check_triton(),
        check_disk(settings.home),
        check_settings(settings),
        check_database(settings),
        *([] if is_remote(settings.tracking_uri) else [check_mlflow_store(settings)]),
        *check_services(settings),
        check_bucket(settings) if settings.artifacts.startswith("s3://") else check_artifacts(settings),
    ]


def check_python() -> Finding:
    """The interpreter; one older than 3.11 would not have come this far."""
    return Finding("python", "ok", f"Python {platform.python_version()} at {sys.executable}")


def check_torch() -> Finding:
    """PyTorch and what it can compute on."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return Finding("torch", "problem", f"PyTorch cannot be imported: {error}", "pip install 'torch>=2.13,<2.14'")
    threads = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
        return Finding("torch", "ok", f"PyTorch {torch.__version__} with CUDA {torch.version.cuda}: {names}; {threads}")
    if shutil.which("nvidia-smi"):
        return Finding(
            "torch",
            "warning",
            f"PyTorch {torch.__version__} cannot use the NVIDIA GPU that this machine seems to have; {threads}.",
            "Compare the driver's CUDA version (nvidia-smi) with torch.version.cuda, or install a CUDA build of torch.",
        )
    return Finding("torch", "ok", f"PyTorch {torch.__version__}, CPU only, {threads}")


def check_triton() -> Finding:
    """Triton, which the kernels need on a GPU; without it their plain PyTorch references run."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        if shutil.which("nvidia-smi"):
            remedy = "pip install 'triton>=3.5,<4'"
            return Finding("triton", "warning", "Triton is not installed, so kernels run as plain PyTorch.", remedy)
        return Finding("triton", "ok", "Triton is not installed; without a GPU kernels run as plain PyTorch anyway.")
    return Finding("triton", "ok", f"Triton {version}")


def check_disk(home: Path) -> Finding:
    """Room and write permission where Regraft keeps its things."""
    place = next(path for path in (home.absolute(), *home.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            "disk",
            "problem",
            f"Regraft's home {home} cannot be written.",
            "Mend its owner and mode, or choose another with REGRAFT_HOME.",
        )
    free = shutil.disk_usage(place).free
    message = f"{free / 2**30:.1f} GiB free at {home}"
    if free < PROBLEM_BYTES:
        return Finding("disk", "problem", message, "Free at least 1 GiB, or choose another disk with REGRAFT_HOME.")
    if free < WARN_BYTES:
        return Finding("disk", "warning", message, "Base models and checkpoints want 5 GiB or more.")
    return Finding("disk", "ok", message)


def check_settings(settings: Settings) -> Finding:
    """Where the settings come from, and what they say beyond the defaults, secrets masked."""
    file = configuration_file()
    variables = sorted(
        f"REGRAFT_{name.upper()}" for name in Settings.model_fields if f"REGRAFT_{name.upper()}" in os.environ
    )
    origins = [str(file)] if file is not None else []
    said = settings.model_dump(exclude_defaults=True, exclude={"home", "actor"})
    values = ", ".join(f"{name}={_shown(settings, name)}" for name in said)
    origin = " and ".join([*origins, *([", ".join(variables)] if variables else [])]) or "embedded defaults"
    return Finding("settings", "ok", f"home={settings.home}{', ' if values else ''}{values}; from {origin}")


def _shown(settings: Settings, name: str) -> str:
    if name == "database_url":
        return redacted_url(settings.registry_url)
    if name == "mlflow_tracking_uri":
        return redacted_url(settings.tracking_uri)
    value = getattr(settings, name)
    return redacted_url(value) if isinstance(value, str) else str(value)


def check_database(settings: Settings) -> Finding:
    """Whether the registry's database answers; a SQLite file that is not there yet is well."""
    return _database("database", settings.registry_url)


def check_mlflow_store(settings: Settings) -> Finding:
    """Whether the database that MLflow opens in-process answers, where there is no MLflow server by setting."""
    return _database("mlflow store", settings.tracking_uri)


def _database(subject: str, url: str) -> Finding:
    from infra.database import engine_for, ping

    def look() -> str:
        engine = engine_for(url)
        file = engine.url.database
        if engine.dialect.name == "sqlite" and file and not Path(file).exists():
            return f"{redacted_url(url)} is created at first use."
        try:
            ping(engine)
        finally:
            engine.dispose()
        return f"{redacted_url(url)} answers."

    return _tried(subject, look)


def check_services(settings: Settings) -> list[Finding]:
    """The Prefect and MLflow servers; a local one that is stopped is well, it starts on demand."""
    findings = []
    for service in LocalServices(settings).status():
        where = f"{'remote' if service.remote else 'local'} server at {service.url}"
        match service.state:
            case "running":
                findings.append(Finding(service.name, "ok", f"The {where} answers."))
            case "stopped":
                findings.append(Finding(service.name, "ok", "The local server is stopped; it starts on demand."))
            case "starting":
                message = f"The {where} (pid {service.pid}) runs, but does not answer yet."
                findings.append(
                    Finding(service.name, "warning", message, "If it stays so: regraft down, then regraft up")
                )
            case "unreachable":
                message = f"The {where} does not answer."
                remedy = "Check that it runs and that the address is right, or unset it to use a local server."
                findings.append(Finding(service.name, "problem", message, remedy))
    return findings


def check_artifacts(settings: Settings) -> Finding:
    """Whether the artifact store, where it is not in S3, is a folder."""
    if "://" in settings.artifacts:
        message = f"artifact_store is {redacted_url(settings.artifacts)}, which is neither a folder nor in S3."
        return Finding("artifacts", "problem", message, "Write an absolute path or s3://BUCKET/PREFIX, or unset it.")
    return Finding("artifacts", "ok", f"The artifact store is the folder {settings.artifacts}.")


def check_bucket(settings: Settings) -> Finding:
    """Whether the bucket of the artifact store is there for us."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    from infra.object_storage import parse_s3_url, s3_client

    place = f" at {redacted_url(settings.s3_endpoint_url)}" if settings.s3_endpoint_url else ""

    def look() -> str:
        bucket, _ = parse_s3_url(settings.artifacts)
        s3_client(settings, attempts=1).head_bucket(Bucket=bucket)
        return f"Bucket {bucket}{place} is there."

    try:
        return _tried("s3", look)
    except NoCredentialsError:
        remedy = "Set s3_access_key_id and s3_secret_access_key, or an AWS profile: aws configure"
        return Finding("s3", "problem", f"There are no credentials for {settings.artifacts}{place}.", remedy)
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        what, remedy = {
            403: ("may not be used with these credentials", "Check the keys, and the bucket's policy."),
            404: ("is not there", f"Create it: aws s3 mb s3://{settings.artifacts.split('/')[2]}"),
        }.get(status, (f"answers with HTTP status {status}", "Check s3_endpoint_url and s3_region."))
        return Finding("s3", "problem", f"The bucket of {settings.artifacts}{place} {what}.", remedy)
    except BotoCoreError as error:
        reason = without_secrets(str(error), settings.s3_endpoint_url or "")
        return Finding("s3", "problem", f"The S3 server{place} does not answer: {reason}", "Check s3_endpoint_url.")


def _tried(subject: str, look: Callable[[], str]) -> Finding:
    """The finding of a look that answers with what it saw, or raises one of our errors."""
    try:
        return Finding(subject, "ok", look())
    except RegraftError as error:
        return Finding(subject, "problem", error.what, error.remedy)
