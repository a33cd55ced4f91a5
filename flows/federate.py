"""Regraft: one adapter from clients' data that stay apart (FLoRA, arXiv 2409.05976), round by round, in this process.

In each round every client takes the base with the global adapter folded in, trains a fresh LoRA of its own rank on its
own examples, and hands in that alone; the server makes one LoRA of them and adds it to the global adapter. Each round's
global adapter is a version, with what its clients handed in, added to the one before, as parents.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from flows.base_models import find_base
from flows.derived import Measured, drawn, measured, register_made
from flows.progress import Stage
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from flows.select_data import select_data
from flows.suites import default_suites
from infra.errors import Interrupted, InvalidInput, RegraftError
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.addresses import adapter_name
from registry.records import BaseModelRecord, Parent, VersionRecord
from training.base_models import LoadedBase, load_base
from training.checkpoints import exclusive
from training.data.example import Example, fingerprint
from training.device import base_dtype, best_device
from training.federation.aggregation import added, aggregated
from training.federation.options import FederationOptions
from training.federation.shards import shards
from training.interchange.lora_layers import fold, layers_from_peft
from training.merging.adapter import Adapter
from training.methods.borrowing import borrowed
from training.methods.contract import stored_config, stored_tensors, write_stored
from training.options import MethodChoice
from training.progress import TrainingEvent
from training.recipe import Recipe
from training.shared_bases import shared_bases
from training.trainer import train_recipe

FEDERATED, FURTHER = "federated_from", "trained_from"


class Round(BaseModel):
    """What one round made.

    Attributes:
        address: the global adapter after it.
        clients: what each client handed in, on top of the global adapter before it, as versions.
        failed: what went wrong, by client.
        deviation: how far the gathered update is from the clients' mean, ‖made − meant‖ / ‖meant‖.
    """

    model_config = ConfigDict(frozen=True)

    address: str
    clients: dict[int, str]
    failed: dict[int, str]
    deviation: float


class Federation(BaseModel):
    """What a federation made, round by round, and how the last global adapter measures."""

    model_config = ConfigDict(frozen=True)

    address: str
    base: str
    examples: list[int]
    rounds: list[Round]
    measured: dict[str, list[Measured]]
    seconds: float


@dataclass(frozen=True)
class FederationPlan:
    """What all rounds share."""

    recipe: Recipe
    options: FederationOptions
    base: BaseModelRecord
    parts: tuple[tuple[Example, ...], ...]

    @property
    def workdir(self) -> Path:
        """Where what is done so far lies; of these settings and data alone."""
        told = [self.recipe.as_stored(), self.options.model_dump(mode="json"), self.base.identity_sha256]
        told += [[fingerprint(part) for part in self.parts]]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        return get_settings().runs / f"federate-{self.recipe.adapter}-{digest}"

    def of_client(self, client: int, number: int) -> Recipe:
        """How a client trains in a round: fresh, with a rank of its own."""
        rank = self.options.ranks[client % len(self.options.ranks)]
        method = MethodChoice(name="lora", **{**self.recipe.method.options, "rank": rank, "alpha": 2 * rank})
        training = self.recipe.training.model_copy(update={"validate_every": None, "early_stopping": None})
        return self.recipe.model_copy(
            update={
                "adapter": f"{self.recipe.adapter}-client-{client}",
                "method": method,
                "training": training,
                "seed": (self.recipe.seed + 1000 * number + client) % 2**32,
                "made_of": (),
            }
        )


@flow(name="federate", flow_run_name="federate {recipe.adapter}", on_failure=[cancel_if_interrupted])
def federate(recipe: Recipe, options: FederationOptions = FederationOptions(), evaluate: bool = True) -> Federation:
    """Train an adapter on parts of the recipe's data that never meet; one that was interrupted goes on where it was.

    Args:
        recipe: what to train on, how long a client trains in a round, and what the global adapter is measured on.
        options: how many clients, and what is made of what they hand in.
        evaluate: measure the global adapter after each round.

    Raises:
        InvalidInput: another method than lora, or more clients than examples.
        RegraftError: fewer clients came through than must have.
        Interrupted: Ctrl-C or SIGTERM.
    """
    began = time.monotonic()
    plan = plan_federation(recipe, options)
    with exclusive(plan.workdir), shared_bases():
        kept = plan.workdir / "rounds.json"
        rounds = [Round.model_validate(each) for each in json.loads(kept.read_text())] if kept.is_file() else []
        for number in range(len(rounds), options.rounds):
            rounds.append(_round(plan, number, rounds[-1].address if rounds else None))
            _keep(kept, [each.model_dump(mode="json") for each in rounds])
        registry, found = AdapterRegistry(), {}
        if evaluate:
            prepared = drawn(default_suites(recipe), registry.get(rounds[-1].address))
            found = {each.address: measured(registry.get(each.address), [], prepared) for each in rounds}
        shutil.rmtree(plan.workdir, ignore_errors=True)
    rows = [{"round": each.address, **{m.suite: m.child.value for m in found.get(each.address, [])}} for each in rounds]
    report_table(recipe.adapter, "federation", rows)
    return Federation(
        address=rounds[-1].address,
        base=plan.base.name,
        examples=[len(part) for part in plan.parts],
        rounds=rounds,
        measured=found,
        seconds=time.monotonic() - began,
    )


def plan_federation(recipe: Recipe, options: FederationOptions) -> FederationPlan:
    """The clients' data, after every check that needs no model. See `federate`."""
    adapter_name(recipe.adapter)
    if recipe.method.name != "lora":
        raise InvalidInput(
            f"Clients hand in LoRAs; the recipe's method is {recipe.method.name}.", "Set method.name to lora."
        )
    record, _ = find_base(recipe.base)
    data = select_data(recipe)
    if len(data.train) < options.clients:
        raise InvalidInput(
            f"{len(data.train)} examples cannot be parted among {options.clients} clients.", "Ask for fewer clients."
        )
    parts = shards(data.train, options.clients, options.skew, recipe.seed)
    return FederationPlan(recipe, options, record, tuple(map(tuple, parts)))


@task(task_run_name="round {number}", cache_policy=NO_CACHE)
def _round(plan: FederationPlan, number: int, before: str | None) -> Round:
    registry = AdapterRegistry()
    whole = _stored(registry.materialise(before), before) if before else None
    base = _base_with(plan, whole)
    handed_in: dict[int, Adapter] = {}
    failed: dict[int, str] = {}
    for client in range(plan.options.clients):
        try:
            handed_in[client] = _client(plan, number, client, base)
        except Interrupted:
            raise
        except RegraftError as error:
            failed[client] = error.what
    if len(handed_in) < plan.options.least:
        raise RegraftError(
            f"{len(handed_in)} of {plan.options.clients} clients came through round {number}, "
            f"{plan.options.least} must: {next(iter(failed.values()))}",
            "Mend what is told, and give the same command again: those that came through do not train again.",
        )
    total = sum(len(plan.parts[client]) for client in handed_in)
    shares = [len(plan.parts[client]) / total for client in handed_in]
    update = aggregated(list(handed_in.values()), shares, plan.options.aggregation)
    clients = _register_clients(plan, number, before, whole, handed_in)
    merged = added(whole, update, plan.options.rank)
    parents = [
        Parent(address, FEDERATED, {"round": number, "share": share, "aggregation": plan.options.aggregation})
        for address, share in zip(clients.values(), shares, strict=True)
    ]
    if before:
        parents.append(Parent(before, FURTHER, {"round": number}))
    recipe = plan.recipe.model_copy(update={"made_of": tuple(clients.values()), "migration_kit": None})
    version = _register(plan, recipe, merged, parents, {"deviation": update.deviation.overall})
    return Round(address=version.address, clients=clients, failed=failed, deviation=update.deviation.overall)


def _base_with(plan: FederationPlan, whole: Adapter | None) -> LoadedBase:
    """A copy of the base in float32 with the global adapter folded in."""
    device = best_device()
    base = load_base(
        plan.base.reference,
        cache=get_settings().base_models,
        dtype=base_dtype(device, plan.recipe.training.precision, trained=True),
        device=device,
    )
    if whole is not None:
        fold(layers_from_peft(dict(whole.config), whole.tensors), base.model)
    return base


def _client(plan: FederationPlan, number: int, client: int, base: LoadedBase) -> Adapter:
    """What a client hands in: trained now, or before the federation was stopped."""
    place, name = plan.workdir / f"round-{number}-client-{client}", f"client {client}"
    if not (place / "adapter").is_dir():
        stage = Stage(f"federate {plan.recipe.adapter}: round {number}, client {client}")

        def on_event(event: TrainingEvent) -> None:
            stage(event.step, event.total_steps, f"loss {event.loss:.3f}")

        with borrowed(base.model):
            adapted, _ = train_recipe(
                plan.of_client(client, number),
                base,
                plan.parts[client],
                (),
                workdir=place / "training",
                on_event=on_event,
                on_preparing=lambda what, done, total: None,
            )
            partial = place / "adapter.partial"
            shutil.rmtree(partial, ignore_errors=True)
            adapted.save(partial)
        partial.rename(place / "adapter")
        shutil.rmtree(place / "training", ignore_errors=True)
    return _stored(place / "adapter", name)


def _register_clients(
    plan: FederationPlan, number: int, before: str | None, whole: Adapter | None, handed_in: dict[int, Adapter]
) -> dict[int, str]:
    """A version for each client that came through: what it handed in, on top of the global adapter."""
    kept = plan.workdir / f"round-{number}-versions.json"
    known: dict[str, str] = json.loads(kept.read_text()) if kept.is_file() else {}
    for client, adapter in handed_in.items():
        if str(client) not in known:
            parents = (
                [Parent(before, FURTHER, {"round": number, "examples": len(plan.parts[client])})] if before else []
            )
            recipe = plan.of_client(client, number).model_copy(update={"migration_kit": None})
            metrics = {"examples": float(len(plan.parts[client]))}
            known[str(client)] = _register(plan, recipe, added(whole, adapter), parents, metrics).address
            _keep(kept, known)
    return {client: known[str(client)] for client in handed_in}


def _register(
    plan: FederationPlan, recipe: Recipe, adapter: Adapter, parents: Sequence[Parent], metrics: dict[str, float]
) -> VersionRecord:
    return register_made(
        recipe.adapter,
        plan.base,
        recipe.as_stored(),
        plan.recipe.data.task,
        plan.recipe.description or None,
        lambda directory: write_stored(directory, adapter.config, adapter.tensors),
        parents,
        metrics,
    )


def _stored(directory: Path, name: str) -> Adapter:
    return Adapter(name, stored_config(directory), stored_tensors(directory))


def _keep(path: Path, content: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
