"""Regraft all adapters of a base model that is going away."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from pydantic import BaseModel, ConfigDict

from flows.fleet_board import WAITING, Board, fleet_directory
from flows.fleet_plan import FleetItem, FleetPlan, plan_fleet
from flows.fleet_report import fleet_page
from flows.migrate_adapter import Compared, migrate_adapter
from flows.progress import Stage, listening
from flows.promote_adapter import Promotion, promote_adapter
from flows.ray_cluster import one_worker_each, ray_runner
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from infra.errors import Interrupted, RegraftError
from registry import AdapterRegistry
from registry.attachments import MIGRATION_KIT
from registry.lineage import MIGRATED
from training.checkpoints import exclusive
from training.evaluation.suite import Suite
from training.migration.options import FleetOptions
from training.shared_bases import shared_bases

logger = logging.getLogger(__name__)

Decision = Literal["promoted", "as good", "not as good", "not measured", "failed", "cannot move"]


class Moved(BaseModel):
    """What became of one adapter of a fleet; its numbers are those that the lineage keeps."""

    model_config = ConfigDict(frozen=True)

    address: str
    aliases: tuple[str, ...]
    method: str
    migrated: str | None
    decision: Decision
    problem: str | None
    compared: list[Compared]
    acceptance: float | None
    inputs: int | None
    seconds: float | None


class Fleet(BaseModel):
    """What became of all adapters of a base model."""

    model_config = ConfigDict(frozen=True)

    source: str
    target: str
    adapters: list[Moved]
    report: Path
    seconds: float

    def count(self, decision: Decision) -> int:
        """Adapters of which that was decided."""
        return sum(adapter.decision == decision for adapter in self.adapters)


@flow(name="migrate-fleet", flow_run_name="migrate all of {source} to {target}", on_failure=[cancel_if_interrupted])
def migrate_fleet(
    source: str,
    target: str,
    options: FleetOptions = FleetOptions(),
    suites: tuple[Suite, ...] = (),
    evaluate: bool = True,
    alias: str | None = None,
    promote_to: str | None = None,
) -> Fleet:
    """Migrate every adapter that `plan_fleet` finds; one that fails does not stop the others.

    They move one after the other, or, where the settings name a Ray cluster, at the same time on its workers.
    What stands on the target already is left alone, so that a fleet that was interrupted goes on where it was.

    Args:
        source: the base model that is going away.
        target: the one to move to.
        options: how each is moved.
        suites: to measure on. None given: those of each version's recipe.
        evaluate: measure old adapters, bare target and new adapters.
        alias: only versions that this alias points at.
        promote_to: an alias, moved to each new version whose old one it points at, if it passes and policy allows.

    Raises:
        NotFound, InvalidInput: as `plan_fleet`.
        Interrupted: Ctrl-C or SIGTERM.
    """
    began = time.monotonic()
    plan = plan_fleet(source, target, options, alias, own_suites=evaluate and not suites)
    workdir = fleet_directory(plan.source, plan.target)
    with exclusive(workdir):
        Board.begin(plan.source, plan.target, [item.address for item in plan.to_do])
        run = _here if (cluster := ray_runner()) is None else spread.with_options(task_runner=cluster)
        problems = finish(plan, promote_to) | run(plan, options, suites, evaluate, promote_to)
        if not problems:
            shutil.rmtree(workdir / "pools", ignore_errors=True)
        adapters = outcome(plan, promote_to, problems)
        written = fleet_page(plan.source, plan.target, [adapter.model_dump() for adapter in adapters])
        report = workdir / f"report-{datetime.now(UTC):%Y%m%d-%H%M%S}.html"
        report.write_text(written, encoding="utf-8")
    rows = [{"adapter": a.address, "new version": a.migrated or "–", "decision": a.decision} for a in adapters]
    report_table(f"{plan.source} to {plan.target}", "fleet", rows)
    return Fleet(
        source=plan.source, target=plan.target, adapters=adapters, report=report, seconds=time.monotonic() - began
    )


def _here(
    plan: FleetPlan, options: FleetOptions, suites: tuple[Suite, ...], evaluate: bool, promote_to: str | None
) -> dict[str, str]:
    """Migrate what is to be done, in order, in this process."""
    stage = Stage(f"migrate {plan.source} to {plan.target}")
    problems = move(plan.to_do, plan.source, plan.target, options, suites, evaluate, promote_to, stage)
    stage(len(plan.to_do), len(plan.to_do))
    return problems


@flow(name="spread-fleet", flow_run_name="{plan.source} to {plan.target} over Ray")
def spread(
    plan: FleetPlan, options: FleetOptions, suites: tuple[Suite, ...], evaluate: bool, promote_to: str | None
) -> dict[str, str]:
    """Migrate what is to be done on a cluster's workers; adapters that share a kit go to the same one.

    Its task runner is the cluster.
    """
    groups: dict[str, list[FleetItem]] = {}
    for item in plan.to_do:
        groups.setdefault(_pool(item, options), []).append(item)
    stage, done = Stage(f"migrate {plan.source} to {plan.target}"), 0
    problems: dict[str, str] = {}
    stage(0, len(plan.to_do))
    with one_worker_each():
        futures = {
            move_group.submit(items, plan.source, plan.target, options, suites, evaluate, promote_to): items
            for items in groups.values()
        }
    try:
        for future in as_completed(list(futures)):
            items = futures[future]
            found = future.result(raise_on_failure=False)
            if isinstance(found, BaseException):
                found = {item.address: f"its worker failed: {found}" for item in items}
            problems |= found
            done += len(items)
            stage(done, len(plan.to_do))
    except KeyboardInterrupt:
        raise Interrupted("The migrations were stopped.", "Run the same command again: they go on.") from None
    return problems


def move(
    items: Sequence[FleetItem],
    source: str,
    target: str,
    options: FleetOptions,
    suites: tuple[Suite, ...],
    evaluate: bool,
    promote_to: str | None,
    tell: Callable[[int, int, str], None] | None = None,
) -> dict[str, str]:
    """Migrate adapters one after the other; returns what went wrong, by address.

    What has moved already is left alone: a cluster may give the same work to a second worker.
    """
    registry, board = AdapterRegistry(), Board(source, target)
    problems: dict[str, str] = {}
    moved = {edge.parent for edge in registry.edges_onto(target, MIGRATED)}
    with shared_bases():
        for done, item in enumerate(items):
            if tell:
                tell(done, len(items), item.address)
            if item.address in moved:
                continue
            board.moving(item.address)
            try:
                with listening(board.hear):
                    migration = migrate_adapter(
                        item.address,
                        target,
                        options.on(registry.get(item.address).recipe),
                        suites=suites,
                        evaluate=evaluate,
                        promote_to=promote_to if promote_to in item.aliases else None,
                        pool=fleet_directory(source, target) / "pools" / f"{_pool(item, options)}.jsonl",
                    )
            except Interrupted:
                board.done(item.address, WAITING, "stopped")
                raise
            except Exception as error:  # whatever it is, the others shall not wait for it
                problems[item.address] = str(error) if isinstance(error, RegraftError) else repr(error)
                logger.warning("%s could not be migrated: %s", item.address, problems[item.address])
                board.done(item.address, "failed", problems[item.address])
            else:
                if refused := _refused(migration.promotion):
                    problems[item.address] = refused
                board.done(item.address, "moved", refused or migration.address)
    return problems


def finish(plan: FleetPlan, promote_to: str | None) -> dict[str, str]:
    """What was left undone of adapters that have moved, by a process that was killed: their kits, their promotions.

    Returns what went wrong, by address.
    """
    registry = AdapterRegistry()
    kits = registry.attachments_on(plan.target, MIGRATION_KIT)
    edges = {edge.parent: edge for edge in registry.edges_onto(plan.target, MIGRATED)}
    problems: dict[str, str] = {}
    for item in plan.items:
        if item.migrated is None:
            continue
        try:
            kept = None if item.migrated in kits else registry.attachment(item.address, MIGRATION_KIT)
            if kept is not None:
                registry.attach(item.migrated, MIGRATION_KIT, registry.materialise_attachment(kept), kept.details)
            compared = edges[item.address].details.get("compared") or [{"passed": False}]
            asked = promote_to in item.aliases and all(suite["passed"] for suite in compared)
            if asked and (refused := _refused(promote_adapter(item.migrated, alias=str(promote_to)))):
                problems[item.address] = refused
        except RegraftError as error:
            problems[item.address] = str(error)
    return problems


def _refused(promotion: Promotion | None) -> str | None:
    """Why an alias did not move, where it was to."""
    if promotion is None or promotion.moved:
        return None
    failed = ", ".join(f"{check.name} {check.measured}" for check in promotion.checks if not check.passed)
    return f"{promotion.alias} was refused: {failed}"


move_group = task(name="migrate adapters of one kit", cache_policy=NO_CACHE)(move)


def outcome(plan: FleetPlan, promote_to: str | None, problems: Mapping[str, str]) -> list[Moved]:
    """What became of each adapter, as the registry knows it now.

    Args:
        plan: of before.
        promote_to: the alias that new versions were to get.
        problems: why what was tried failed, by address.
    """
    registry = AdapterRegistry()
    edges = {edge.parent: edge for edge in registry.edges_onto(plan.target, MIGRATED)}
    holders = {v.address for v in registry.search(base=plan.target, alias=promote_to)} if promote_to else set()
    found = []
    for item in plan.items:
        edge = edges.get(item.address)
        details: Mapping[str, Any] = edge.details if edge else {}
        compared = [Compared.model_validate(each) for each in details.get("compared", ())]
        decision: Decision
        if edge is None:
            decision = "cannot move" if item.obstacle else "failed"
        elif edge.child in holders:
            decision = "promoted"
        elif not compared:
            decision = "not measured"
        else:
            decision = "as good" if all(each.passed for each in compared) else "not as good"
        found.append(
            Moved(
                address=item.address,
                aliases=item.aliases,
                method=item.method,
                migrated=edge.child if edge else None,
                decision=decision,
                problem=problems.get(item.address) or (item.obstacle if edge is None else None),
                compared=compared,
                acceptance=details.get("acceptance"),
                inputs=details.get("inputs"),
                seconds=details.get("seconds"),
            )
        )
    return found


def _pool(item: FleetItem, options: FleetOptions) -> str:
    """Names the inputs that the target writes for an adapter: the same for all that share a kit."""
    content = json.dumps([item.kit, item.inputs, options.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
