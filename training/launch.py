"""Data-parallel training: one process a share of each batch, on this machine.

The parent writes a job folder, starts the processes, passes their events on, and attaches what they trained. Each runs
`python -m training.launch JOB`: `train_recipe` under `accelerate`'s environment variables (DDP; gloo on the CPU, NCCL
on GPUs). With `training.shard_base` they split the base's weights among them as they load it (FSDP2, by transformers'
plan for the architecture); the adapter is on each of them, as under DDP. If one process dies, the others are stopped;
if the parent dies, they write a checkpoint and stop.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import infra.errors
from infra.errors import BaseModelMismatch, Interrupted, InvalidInput, RegraftError
from infra.settings import get_settings
from training.checkpoints import exclusive, launch_directory
from training.data.example import Example
from training.device import best_device
from training.interruption import Interruption, awaited_interruption
from training.methods.catalog import get_method
from training.methods.contract import Adapted
from training.progress import OnEvent, TrainingEvent, TrainingOutcome
from training.recipe import Recipe

if TYPE_CHECKING:
    from training.base_models import LoadedBase

_POLL_SECONDS = 0.1
_JOB, _EVENTS, _OUTCOME, _ADAPTER = "job.json", "events.jsonl", "outcome.json", "adapter"


def launch(
    recipe: Recipe,
    base: "LoadedBase",
    train_examples: Sequence[Example],
    validation_examples: Sequence[Example],
    *,
    workdir: Path,
    on_event: OnEvent,
) -> tuple[Adapted, TrainingOutcome]:
    """`train_recipe` on `training.processes` processes; arguments, result and errors are the same.

    Raises:
        RegraftError: also when a process dies; its log is named.
    """
    # Where the workers split the base among them, the parent's copy may be too large for any one device.
    sharded = recipe.training.shard_base
    device = best_device().type if sharded else next(base.model.parameters()).device.type
    processes = recipe.training.processes
    if device == "cuda" and processes > torch.cuda.device_count():
        raise InvalidInput(
            f"training.processes is {processes}, but there are {torch.cuda.device_count()} GPUs.",
            f"Set training.processes to {torch.cuda.device_count()} or less.",
        )
    with exclusive(workdir), awaited_interruption() as interruption:
        directory = launch_directory(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        for stale in [*directory.glob("error-*.json"), directory / _OUTCOME]:
            stale.unlink(missing_ok=True)
        job = {
            "recipe": recipe.as_stored(),
            "base": str(base.directory),
            "identity": base.identity.sha256,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "device": device,
            "workdir": str(workdir),
            "train": [asdict(example) for example in train_examples],
            "validation": [asdict(example) for example in validation_examples],
        }
        (directory / _JOB).write_text(json.dumps(job), encoding="utf-8")
        (directory / _EVENTS).write_text("", encoding="utf-8")
        _run(directory, processes, interruption, on_event)
        outcome = TrainingOutcome.stored(json.loads((directory / _OUTCOME).read_text(encoding="utf-8")))
        adapted = get_method(recipe.method.name).load(base.model, directory / _ADAPTER)
    return adapted, outcome


def _run(directory: Path, processes: int, interruption: Interruption, on_event: OnEvent) -> None:
    """Start the workers, and see them to their end."""
    # The parent holds the store in which the workers find each other: no port has to be guessed.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
    workers = [_start(directory, rank, processes, store.port) for rank in range(processes)]
    told = 0
    forwarded = False
    try:
        while any(worker.poll() is None for worker in workers):
            told = _pass_on(directory / _EVENTS, told, on_event)
            if interruption.requested and not forwarded:
                forwarded = True
                for worker in workers:
                    worker.send_signal(signal.SIGTERM)
            if any(worker.poll() not in (None, 0) for worker in workers):
                break
            time.sleep(_POLL_SECONDS)
        _pass_on(directory / _EVENTS, told, on_event)
        _await_the_others(workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
    if failed:
        raise _error(directory, failed, interruption.requested)


def _await_the_others(workers: Sequence["subprocess.Popen[bytes]"]) -> None:
    """One has failed: the others, which may have the better message, get a moment to say so."""
    deadline = time.monotonic() + 5
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _start(directory: Path, rank: int, processes: int, port: int) -> "subprocess.Popen[bytes]":
    threads = max(1, (get_settings().threads or torch.get_num_threads()) // processes)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (directory / f"worker-{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "training.launch", str(directory)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C reaches the parent alone, which passes it on
        )


def _pass_on(path: Path, told: int, on_event: OnEvent) -> int:
    """Tell the events that are whole lines after byte `told`; returns where the next ones begin."""
    with path.open("rb") as file:
        file.seek(told)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    for line in whole.splitlines():
        on_event(TrainingEvent(**json.loads(line)))
    return told + len(whole)


def _error(directory: Path, failed: Sequence[int], interrupted: bool) -> RegraftError:
    for rank in failed:
        path = directory / f"error-{rank}.json"
        if path.is_file():
            told = json.loads(path.read_text(encoding="utf-8"))
            kind: type[RegraftError] = getattr(infra.errors, told["kind"])
            return kind(told["what"], told["remedy"])
    if interrupted:  # before the workers had begun to listen
        return Interrupted("The training was stopped before its first step.", "Run the same command again.")
    log = directory / f"worker-{failed[0]}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return RegraftError(f"Training process {failed[0]} died: {lines[-1] if lines else 'no word of why'}", f"See {log}")


# -- in a worker -------------------------------------------------------------------------------------------------------


def _work(directory: Path) -> None:
    from training.base_models import load_base
    from training.trainer import train_recipe

    job: dict[str, Any] = json.loads((directory / _JOB).read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    recipe = Recipe.model_validate(job["recipe"])
    base = load_base(
        f"path:{job['base']}",
        cache=get_settings().base_models,
        dtype=getattr(torch, job["dtype"]),
        device="cpu" if job["device"] == "cpu" else f"cuda:{rank}",
        shards=recipe.training.processes if recipe.training.shard_base else 1,
    )
    if base.identity.sha256 != job["identity"]:
        raise BaseModelMismatch(f"{job['base']} has changed since the training was started.", "Start it again.")
    with (directory / _EVENTS).open("a", encoding="utf-8") as events:

        def tell(event: TrainingEvent) -> None:
            events.write(json.dumps(asdict(event)) + "\n")
            events.flush()

        adapted, outcome = train_recipe(
            recipe,
            base,
            [Example.stored(content) for content in job["train"]],
            [Example.stored(content) for content in job["validation"]],
            workdir=Path(job["workdir"]),
            on_event=tell,
        )
    if rank == 0:
        adapted.save(directory / _ADAPTER)
        (directory / _OUTCOME).write_text(json.dumps(outcome.as_stored()), encoding="utf-8")
    torch.distributed.barrier()  # nobody leaves while another still reads from it
    torch.distributed.destroy_process_group()


def _stop_with(parent: int) -> None:
    """Ask this process to stop, with a checkpoint, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main(directory: Path) -> None:
    """One worker; its error, if any, goes into the job folder for the parent to raise."""
    threading.Thread(target=_stop_with, args=(os.getppid(),), daemon=True).start()
    try:
        _work(directory)
    except RegraftError as error:
        told = {"kind": type(error).__name__, "what": error.what, "remedy": error.remedy}
        (directory / f"error-{os.environ['RANK']}.json").write_text(json.dumps(told), encoding="utf-8")
        raise SystemExit(error.exit_code) from error
    # Whatever of gloo is taken down with the interpreter has been seen to wait for ever for a process that is gone.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
