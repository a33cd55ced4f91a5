"""Clients as nodes of Flower's Simulation Runtime: each in a process of its own, and only LoRAs leave it.

`client_app` is what a node runs. Per round it gets, in a message, the recipe of its training and the global adapter as
arrays, and answers with its own factors A and B as arrays. Its examples lie in a file that only it reads, as its
checkpoints do, in the run's folder.

Written on the Message API of flwr 1.32. Of the ways to start its Simulation Runtime, `run_simulation` is the one that
stays in this process, where the registry and Prefect are; flwr calls it deprecated in favour of `flwr run`, which
starts a server of its own for packaged apps.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported
if find_spec("ray") is None:
    raise ImportError("flwr's Simulation Runtime needs ray")

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from infra.errors import Interrupted, RegraftError
from training.base_models import LoadedBase
from training.data.example import Example
from training.device import Precision, best_device
from training.federation.client import TRAINING, folded_base, folder, told, train_client
from training.federation.start import CommonStart
from training.merging.adapter import Adapter
from training.progress import TrainingEvent
from training.recipe import Recipe

CLIENT = "partition-id"  # Flower's name for a node's number
LONG = 30 * 86400.0  # seconds that a message may take: Flower's 12 hours are less than a client may train
POLL = 0.1  # seconds
START = 300.0  # seconds in which the runtime must have started
_DATA, _STOP = "clients", "stop"

client_app = ClientApp()


@client_app.query()
def introduce(message: Message, context: Context) -> Message:
    """Which client the node is."""
    return Message(RecordDict({"who": ConfigRecord({"client": int(context.node_config[CLIENT])})}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """The node's training of a round; its answer holds either the LoRA or what went wrong."""
    job, client = message.content["job"], int(context.node_config[CLIENT])
    try:
        answer = packed(_trained(job, client, unpacked(message.content, "the global adapter")))
    except Interrupted as error:
        answer = {"stopped": ConfigRecord({"what": error.what})}
    except Exception as error:
        answer = {"failed": ConfigRecord({"what": told(error)})}
    return Message(RecordDict(answer), reply_to=message)


def _trained(job: Mapping[str, Any], client: int, whole: Adapter | None) -> Adapter:
    workdir, recipe = Path(job["workdir"]), Recipe.model_validate_json(job["recipe"])
    stop = workdir / _STOP

    def on_event(event: TrainingEvent) -> None:
        if stop.exists():
            signal.raise_signal(signal.SIGTERM)  # which the training awaits, and writes a checkpoint

    examples = [
        Example.stored(each) for each in json.loads((workdir / _DATA / f"{client}.json").read_text(encoding="utf-8"))
    ]
    base = _base(job["reference"], job["identity"], recipe.training.precision, _Kept(job["round"], workdir, whole))
    start = CommonStart(*job["start"]) if job["start"] else None
    return train_client(recipe, base, examples, folder(workdir, job["round"], client) / TRAINING, on_event, start)


@dataclass(frozen=True)
class _Kept:
    """The global adapter of a round, which is known by the round."""

    round: int
    workdir: Path
    whole: Adapter | None = field(compare=False)


@lru_cache(maxsize=1)  # a process serves several clients, one after the other
def _base(reference: str, identity: str, precision: Precision, kept: _Kept) -> LoadedBase:
    return folded_base(reference, identity, precision, kept.whole)


def packed(adapter: Adapter | None) -> dict[str, Any]:
    """The records of a message that carry an adapter: its factors as arrays, its config as JSON; none for none."""
    if adapter is None:
        return {}
    config = ConfigRecord({"json": json.dumps(adapter.config)})
    return {"adapter": config, "factors": ArrayRecord(torch_state_dict=dict(adapter.tensors))}


def unpacked(content: Mapping[str, Any], name: str) -> Adapter | None:
    """Inverse of `packed`: the adapter that a message carries, under a name."""
    if "factors" not in content:
        return None
    return Adapter(name, json.loads(content["adapter"]["json"]), dict(content["factors"].to_torch_state_dict()))


class FlowerClients:
    """The clients of a federation as Flower's nodes. A simulation runs for as long as a round trains, and no longer.

    Args:
        parts: each client's examples.
        recipe_of: how a client (from 0) trains in a round (from 1).
        start_of: what all clients of a round begin with.
        reference: of the base model; see `folded_base`.
        identity: of the base model; see there.
        workdir: of the run.
        on_done: hears of a round, how many of its clients are done, and how many there are.
        ray: `local:N` for N clients at a time, or the address of a Ray cluster that shares `workdir`; none: as many as
            there are CPU cores.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Example]],
        *,
        recipe_of: Callable[[int, int], Recipe],
        start_of: Callable[[int], CommonStart | None],
        reference: str,
        identity: str,
        workdir: Path,
        on_done: Callable[[int, int, int], None],
        ray: str | None = None,
    ) -> None:
        self._recipe_of, self._start_of = recipe_of, start_of
        self._reference, self._identity = reference, identity
        self._workdir, self._on_done, self._ray = workdir, on_done, ray
        self._parts, self._count = parts, len(parts)

    def train(self, number: int, wanted: Sequence[int], whole: Adapter | None) -> Iterator[tuple[int, Adapter | str]]:
        """See `Clients.train`. One whose process dies is asked once more, alone, in a new one."""
        (self._workdir / _DATA).mkdir(parents=True, exist_ok=True)
        for client in wanted:
            content = json.dumps([asdict(example) for example in self._parts[client]])
            (self._workdir / _DATA / f"{client}.json").write_text(content, encoding="utf-8")
        done, lost = 0, []
        for client, answer in self._answers(number, wanted, whole):
            if isinstance(answer, _Lost):
                lost.append(client)
            else:
                done += 1
                self._on_done(number, done, len(wanted))
                yield client, answer
        for client in lost:
            for _, answer in self._answers(number, [client], whole):
                done += 1
                self._on_done(number, done, len(wanted))
                yield client, f"Its process died twice: {answer.what}" if isinstance(answer, _Lost) else answer

    def _answers(
        self, number: int, wanted: Sequence[int], whole: Adapter | None
    ) -> "Iterator[tuple[int, Adapter | str | _Lost]]":
        """What comes back, from a simulation of its own.

        flwr keeps a process that has died, and gives it to whoever is next: where one is lost, others may only seem so.
        """
        with self._simulation() as simulation:
            nodes = simulation.clients(self._count)
            waiting = {nodes[client]: client for client in wanted}
            simulation.send(
                Message(RecordDict({"job": self._job(client, number), **packed(whole)}), node, "train", ttl=LONG)
                for node, client in waiting.items()
            )
            while waiting:
                for reply in simulation.replies():
                    client = waiting.pop(reply.metadata.src_node_id)
                    yield client, _answer(reply, f"client {client}")

    def _job(self, client: int, number: int) -> ConfigRecord:
        start = self._start_of(number)
        return ConfigRecord(
            {
                "round": number,
                "start": [] if start is None else [start.seed, start.rank],
                "recipe": json.dumps(self._recipe_of(client, number).as_stored()),
                "reference": self._reference,
                "identity": self._identity,
                "workdir": str(self._workdir),
            }
        )

    @contextmanager
    def _simulation(self) -> "Iterator[_Simulation]":
        stop = self._workdir / _STOP
        stop.unlink(missing_ok=True)
        simulation = _Simulation(self._count, self._ray)
        try:
            with redirect_stdout(sys.stderr):  # where Ray tells of a process that died: stdout is for results
                yield simulation
        except BaseException:
            stop.touch()  # whoever still trains writes a checkpoint
            raise
        finally:
            simulation.end()
            stop.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Lost:
    """Nothing came back from a client but what Flower says of that."""

    what: str


def _answer(reply: Message, name: str) -> Adapter | str | _Lost:
    if reply.has_error():
        return _Lost(" ".join(reply.error.reason.split())[:300])
    for outcome in ("failed", "stopped"):
        if outcome in reply.content:
            return str(reply.content[outcome]["what"])
    adapter = unpacked(reply.content, name)
    return adapter if adapter is not None else "It answered without a LoRA."


class _Simulation:
    """Flower's Simulation Runtime, in a thread, whose ServerApp lends its grid to this one."""

    def __init__(self, count: int, ray: str | None) -> None:
        self._grids: Queue[Grid] = Queue()
        self._over = threading.Event()
        self._problem: Exception | None = None
        self._sent: set[str] = set()
        server_app = ServerApp()

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            self._grids.put(grid)
            self._over.wait()

        def run() -> None:
            try:
                run_simulation(server_app, client_app, count, backend_config=_resources(count, ray))
            except Exception as error:
                self._problem = error

        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what went wrong is told by who asked
        self._thread = threading.Thread(target=run, name="flower", daemon=True)
        self._thread.start()
        self._grid = self._lent()

    def _lent(self) -> Grid:
        for _ in range(int(START / POLL)):
            self._check()
            try:
                return self._grids.get(timeout=POLL)
            except Empty:
                continue
        raise RegraftError(f"Flower's Simulation Runtime did not start within {START:.0f} s.", "Try it again.")

    def _check(self) -> None:
        if not self._thread.is_alive():
            cause: BaseException | None = self._problem
            while cause is not None and cause.__cause__ is not None:
                cause = cause.__cause__
            raise RegraftError(
                f"Flower's Simulation Runtime ended unasked{f': {cause}' if cause else ''}.",
                "Give the same command again: clients that came through do not train again.",
            )

    def clients(self, count: int) -> dict[int, int]:
        """The node of each client, once all have told who they are."""
        while len(nodes := list(self._grid.get_node_ids())) < count:
            self._check()
            time.sleep(POLL)
        self.send(Message(RecordDict(), node, "query", ttl=LONG) for node in nodes)
        found: dict[int, int] = {}
        while len(found) < count:
            for reply in self.replies():
                if reply.has_error():
                    raise RegraftError(f"One of Flower's nodes does not start: {reply.error.reason[:300]}")
                found[int(reply.content["who"]["client"])] = reply.metadata.src_node_id
        return found

    def send(self, messages: Iterable[Message]) -> None:
        """Give messages to their nodes."""
        self._sent.update(self._grid.push_messages(messages))

    def replies(self) -> Sequence[Message]:
        """What has come back since it was asked for last, perhaps nothing; waits for a moment."""
        self._check()
        found = list(self._grid.pull_messages(self._sent))
        self._sent.difference_update(reply.metadata.reply_to_message_id for reply in found)
        if not found:
            time.sleep(POLL)
        return found

    def end(self) -> None:
        """Stop, once the clients at work are done."""
        self._over.set()
        self._thread.join()


def _resources(count: int, ray: str | None) -> dict[str, dict[str, Any]]:
    """flwr's backend_config: one CPU core a client, and a GPU where there are any."""
    start: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if ray is None or ray.startswith("local:"):
        most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        start |= {
            "address": "local",  # not a cluster that happens to run on this machine
            "num_cpus": min(count, int(ray.removeprefix("local:")) if ray else most),
            "include_dashboard": False,
        }
    else:
        start["address"] = ray
    on_gpu = best_device().type == "cuda"
    return {"init_args": start, "client_resources": {"num_cpus": 1, "num_gpus": 1.0 if on_gpu else 0.0}}
