"""Regraft: one adapter from clients' data that stay apart (FLoRA, arXiv 2409.05976), round by round.

In each round every client takes the base with the global adapter folded in, trains a fresh LoRA of its own rank on its
own examples, and hands in that alone; the server makes one LoRA of them and adds it to the global adapter. Each round's
global adapter is a version, with what its clients handed in, added to the one before, as parents.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from flows.derived import Asked, Measured, drawn, measured, register_made
from flows.federation_clients import clients_of
from flows.federation_plan import FederationPlan, plan_federation
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from flows.suites import default_suites
from infra.errors import RegraftError
from infra.files import write_whole
from registry import AdapterRegistry
from registry.models import VersionState
from registry.records import DatasetRecord, Parent
from training.checkpoints import exclusive
from training.data.example import fingerprint
from training.federation.aggregation import added, aggregated
from training.federation.client import TRAINING, Clients, folder
from training.federation.options import FederationOptions
from training.merging.adapter import Adapter
from training.methods.contract import stored_config, stored_tensors, write_stored
from training.recipe import Recipe
from training.shared_bases import shared_bases

_ROUNDS, _VERSIONS = "rounds.json", "versions.json"
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


@flow(name="federate", flow_run_name="federate {recipe.adapter}", on_failure=[cancel_if_interrupted])
def federate(recipe: Recipe, options: FederationOptions = FederationOptions(), evaluate: bool = True) -> Federation:
    """Train an adapter on parts of the recipe's data that never meet; one that was interrupted goes on where it was.

    Args:
        recipe: what to train on, how long a client trains in a round, and what the global adapter is measured on.
        options: how many clients, and what is made of what they hand in.
        evaluate: measure the global adapter after each round.

    Raises:
        InvalidInput: what `plan_federation` refuses, or a runner that is not installed.
        RegraftError: fewer clients came through than must have; says why.
        Conflict: the same federation is at work in another process.
        Interrupted: Ctrl-C or SIGTERM.
    """
    began = time.monotonic()
    plan = plan_federation(recipe, options)
    kept, clients = plan.workdir / _ROUNDS, clients_of(plan)
    with exclusive(plan.workdir), shared_bases():
        rounds = [Round.model_validate(each) for each in _known(kept, [])]
        for number in range(len(rounds) + 1, options.rounds + 1):
            rounds.append(_round(plan, number, rounds[-1].address if rounds else None, clients))
            write_whole(kept, json.dumps([each.model_dump(mode="json") for each in rounds]))
        registry, found = AdapterRegistry(), {}
        if evaluate:
            last = registry.get(rounds[-1].address)
            prepared = drawn([Asked(suite, last) for suite in default_suites(recipe)])
            found = {each.address: measured(registry.get(each.address), [], prepared) for each in rounds}
        _discard(plan.workdir)
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


@task(task_run_name="round {number}", cache_policy=NO_CACHE)
def _round(plan: FederationPlan, number: int, before: str | None, clients: Clients) -> Round:
    registry = AdapterRegistry()
    whole = _stored(registry.materialise(before), before) if before else None
    handed_in, failed = _handed_in(plan, number, whole, clients)
    if len(handed_in) < plan.options.least:
        reasons = "; ".join(f"client {client}: {what}" for client, what in sorted(failed.items())[:3])
        raise RegraftError(
            f"{len(handed_in)} of {plan.options.clients} clients came through round {number}, "
            f"{plan.options.least} must. {reasons}",
            "Mend what is told, and give the same command again: those that came through do not train again.",
        )
    total = sum(len(plan.parts[client]) for client in handed_in)
    shares = [len(plan.parts[client]) / total for client in handed_in]
    update = aggregated(list(handed_in.values()), shares, plan.options.aggregation)
    versions = _register_clients(plan, number, before, whole, handed_in)
    merged = added(whole, update, plan.options.rank)
    parents = [
        Parent(address, FEDERATED, {"round": number, "share": share, "aggregation": plan.options.aggregation})
        for address, share in zip(versions.values(), shares, strict=True)
    ]
    if before:
        parents.append(Parent(before, FURTHER, {"round": number}))
    recipe = plan.recipe.model_copy(update={"made_of": tuple(versions.values()), "migration_kit": None})
    address = _register_once(plan, number, recipe, merged, parents, {"deviation": update.deviation.overall})
    return Round(address=address, clients=versions, failed=failed, deviation=update.deviation.overall)


def _handed_in(
    plan: FederationPlan, number: int, whole: Adapter | None, clients: Clients
) -> tuple[dict[int, Adapter], dict[int, str]]:
    """What each client hands in, trained now or before the federation was stopped; and what went wrong with the others.

    Each is kept as it comes, so that a stop costs no more than what is under way.
    """
    places = [folder(plan.workdir, number, client) for client in range(plan.options.clients)]
    wanted = [client for client, place in enumerate(places) if not (place / "adapter").is_dir()]
    failed: dict[int, str] = {}
    for client, answer in clients.train(number, wanted, whole) if wanted else ():
        if isinstance(answer, str):
            failed[client] = answer
            continue
        partial = places[client] / "adapter.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_stored(partial, answer.config, answer.tensors)
        partial.rename(places[client] / "adapter")
        shutil.rmtree(places[client] / TRAINING, ignore_errors=True)
    through = [client for client in range(plan.options.clients) if client not in failed]
    return {client: _stored(places[client] / "adapter", f"client {client}") for client in through}, failed


def _register_clients(
    plan: FederationPlan, number: int, before: str | None, whole: Adapter | None, handed_in: dict[int, Adapter]
) -> dict[int, str]:
    """A version for each client that came through: what it handed in, on top of the global adapter."""
    addresses = {}
    for client, adapter in handed_in.items():
        examples = len(plan.parts[client])
        parents = [Parent(before, FURTHER, {"round": number, "examples": examples})] if before else []
        recipe = plan.of_client(client, number).model_copy(update={"migration_kit": None})
        metrics = {"examples": float(examples)}
        origin = recipe.data.model_dump(mode="json", exclude_none=True)
        dataset = DatasetRecord(
            recipe.data.name, fingerprint(plan.parts[client]), examples, origin, recipe.data.selected
        )
        addresses[client] = _register_once(plan, number, recipe, added(whole, adapter), parents, metrics, dataset)
    return addresses


def _register_once(
    plan: FederationPlan,
    number: int,
    recipe: Recipe,
    adapter: Adapter,
    parents: Sequence[Parent],
    metrics: dict[str, float],
    dataset: DatasetRecord | None = None,
) -> str:
    """The address of the version that this is in this round, also where a kill came between making and noting it.

    How many versions there were is noted first: a later one of the same recipe is then the one that was made.
    """
    kept = plan.workdir / f"round-{number}-{_VERSIONS}"
    known: dict[str, dict[str, Any]] = _known(kept, {})
    registry, name, stored = AdapterRegistry(), recipe.adapter, recipe.as_stored()
    noted = known.setdefault(name, {})
    if "address" in noted:
        return str(noted["address"])
    there = registry.versions(name) if registry.has_adapter(name) else []
    if "after" not in noted:
        noted["after"] = max((version.number for version in there), default=0)
        write_whole(kept, json.dumps(known))
    made = next(
        (
            version.address
            for version in there
            if version.number > noted["after"] and version.recipe == stored and version.state == VersionState.READY
        ),
        None,
    )
    noted["address"] = (
        made
        or register_made(
            name,
            plan.base,
            stored,
            plan.recipe.data.task,
            plan.recipe.description or None,
            lambda directory: write_stored(directory, adapter.config, adapter.tensors),
            parents,
            metrics,
            dataset,
        ).address
    )
    write_whole(kept, json.dumps(known))
    return str(noted["address"])


def _discard(workdir: Path) -> None:
    """Remove what is no longer needed, the list of rounds last: whoever comes after a kill here has nothing to do."""
    for path in workdir.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(_VERSIONS):
            path.unlink(missing_ok=True)
    shutil.rmtree(workdir, ignore_errors=True)


def _stored(directory: Path, name: str) -> Adapter:
    return Adapter(name, stored_config(directory), stored_tensors(directory))


def _known(path: Path, nothing: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else nothing
