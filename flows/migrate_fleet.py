"""Regraft all adapters of a base model that is going away."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.fleet_board import WAITING, Board, fleet_directory
from flows.fleet_plan import FleetItem, FleetPlan, plan_fleet
from flows.fleet_report import fleet_page
from flows.migrate_adapter import Compared, migrate_adapter
from flows.migration_plan import MIGRATED
from flows.progress import Stage, listening
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from infra.errors import Interrupted, RegraftError
from registry import AdapterRegistry
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
    """Migrate every adapter that `plan_fleet` finds, one after the other; one that fails does not stop the others.

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
    plan = plan_fleet(source, target, options, alias)
    registry, workdir = AdapterRegistry(), fleet_directory(plan.source, plan.target)
    stage = Stage(f"migrate {plan.source} to {plan.target}")
    problems: dict[str, str] = {}
    with exclusive(workdir), shared_bases():
        board = Board(plan.source, plan.target, [item.address for item in plan.to_do])
        for done, item in enumerate(plan.to_do):
            stage(done, len(plan.to_do), item.address)
            board.moving(item.address)
            try:
                with listening(board.hear):
                    migration = migrate_adapter(
                        item.address,
                        plan.target,
                        options.on(registry.get(item.address).recipe),
                        suites=suites,
                        evaluate=evaluate,
                        promote_to=promote_to if promote_to in item.aliases else None,
                        pool=workdir / "pools" / f"{_pool(item, options)}.jsonl",
                    )
            except Interrupted:
                board.done(item.address, WAITING, "stopped")
                raise
            except Exception as error:  # whatever it is, the others shall not wait for it
                problems[item.address] = str(error) if isinstance(error, RegraftError) else repr(error)
                logger.warning("%s could not be migrated: %s", item.address, problems[item.address])
                board.done(item.address, "failed", problems[item.address])
            else:
                board.done(item.address, "moved", migration.address)
        stage(len(plan.to_do), len(plan.to_do))
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
