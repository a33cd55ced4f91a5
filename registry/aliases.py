"""Aliases: moved by compare-and-swap, every move written down, MLflow's copy kept in step.

The move and its line in the log are one transaction in the registry's tables, which decide. A journal entry opened in
the same transaction stands for MLflow's copy until that has followed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from infra.errors import Conflict, GateRefused, InvalidInput, NotFound
from registry import journal
from registry.database import Database
from registry.models import Adapter, Alias, Decision, Evaluation, JournalState, Promotion, Version, VersionState
from registry.promotion import Verdict
from registry.tracking import Tracking

KIND = "alias"


@dataclass(frozen=True, slots=True)
class Move:
    """A wish to point an alias at a version, and what is to be written in the log about it."""

    alias: str
    decision: Decision
    actor: str
    reason: str | None = None
    report: Mapping[str, Any] | None = None


def holder_of(session: Session, adapter: Adapter, alias: str) -> Alias | None:
    """The alias's row, if it was ever set."""
    return session.get(Alias, (adapter.id, alias), populate_existing=True)


def move(session: Session, version: Version, wish: Move, expected_generation: int) -> tuple[Promotion, int]:
    """Point the alias at the version, log it, announce the mirroring; returns the line and the journal entry.

    Raises:
        Conflict: the alias is not at the expected generation; names who holds it now. Or the version is not ready.
    """
    if version.state is not VersionState.READY:
        raise Conflict(f"{version.address} is {version.state}; an alias points at a ready version only.")
    holder = holder_of(session, version.adapter, wish.alias)
    generation, before = (holder.generation, holder.version_id) if holder else (0, None)
    if generation != expected_generation:
        raise Conflict(
            f"{version.adapter.name}@{wish.alias} has moved since this was decided: "
            f"it is now {holder.version.address if holder else 'unset'}.",
            "Decide again: the candidate has to be compared with the new holder.",
        )
    if holder is None:
        session.add(Alias(adapter_id=version.adapter_id, alias=wish.alias, version_id=version.id, generation=1))
    else:
        swapped = session.execute(
            update(Alias)
            .where(Alias.adapter_id == version.adapter_id, Alias.alias == wish.alias, Alias.generation == generation)
            .values(version_id=version.id, generation=generation + 1, moved_at=datetime.now(UTC))
        )
        assert swapped.rowcount == 1, "the writers' lock is held"  # type: ignore[attr-defined]
    line = log(session, version, wish, from_version_id=before, generation=generation + 1)
    return line, journal.announce(session, KIND, {"adapter": version.adapter.name, "alias": wish.alias})


def log(session: Session, version: Version, wish: Move, *, from_version_id: int | None, generation: int) -> Promotion:
    """Append one line to the log."""
    line = Promotion(
        adapter_id=version.adapter_id,
        alias=wish.alias,
        from_version_id=from_version_id,
        to_version=version,
        decision=wish.decision,
        generation=generation,
        report=dict(wish.report or {}),
        actor=wish.actor,
        reason=wish.reason,
    )
    session.add(line)
    session.flush()
    return line


def require_about(verdict: Verdict, version: Version, alias: str) -> None:
    """Make sure that a verdict is about this very move.

    Raises:
        InvalidInput: it is about another version or alias.
    """
    if (verdict.candidate, verdict.alias) != (version.address, alias):
        about = f"{verdict.candidate} as {verdict.alias}"
        raise InvalidInput(f"The verdict is about {about}, not about {version.address} as {alias}.", "Decide again.")


def refusal_of(session: Session, version: Version, verdict: Verdict, *, protected: bool) -> GateRefused | None:
    """Why a verdict does not let the version pass, or None.

    A protected alias asks more of a verdict than that it passed: each evaluation that it rests on must be recorded of
    this version, have items, and not be made on the data that the version was trained on.
    """
    force = 'Force it, with a reason that is kept: --force --reason "…"'
    if not verdict.passed:
        failed = "; ".join(f"{c.name}: {c.measured}, wanted {c.required}" for c in verdict.checks if not c.passed)
        return GateRefused(f"{version.address} is refused as {verdict.alias}: {failed or 'nothing was asked'}.", force)
    cited = session.scalars(
        select(Evaluation).where(Evaluation.id.in_(verdict.evaluations), Evaluation.version_id == version.id)
    ).unique()
    trained_on = version.dataset.fingerprint if version.dataset else None
    held_out = [row for row in cited if row.samples and row.dataset_fingerprint not in (None, trained_on)]
    if protected and (not held_out or len(held_out) != len(verdict.evaluations)):
        return GateRefused(
            f"{version.address} is refused as {verdict.alias}: it was not evaluated on held-out items.",
            f"Evaluate it: regraft evaluate {version.address}. {force}",
        )
    return None


def previous_holder(session: Session, adapter: Adapter, alias: str) -> tuple[Version, int]:
    """Whom a rollback returns to, as the log tells it, and the alias's generation now.

    Versions that are not ready any more are skipped.

    The log is replayed as a stack: a promotion pushes, a rollback pops, so that two rollbacks go back two promotions.

    Raises:
        NotFound: there is no earlier holder that is still ready, or the alias was never set.
    """
    holder = holder_of(session, adapter, alias)
    if holder is None:
        raise NotFound(f"{adapter.name} has no alias {alias!r}.", f"See: regraft adapters history {adapter.name}")
    stack: list[int] = []
    for line in moves(session, adapter, alias):
        if line.decision is Decision.ROLLED_BACK and line.to_version_id in stack:
            while stack[-1] != line.to_version_id:
                stack.pop()
        elif not stack or stack[-1] != line.to_version_id:
            stack.append(line.to_version_id)
    for version_id in reversed(stack[:-1]):
        version = session.get_one(Version, version_id)
        if version.state is VersionState.READY and version_id != holder.version_id:
            return version, holder.generation
    raise NotFound(
        f"{adapter.name}@{alias} is {holder.version.address}, and there is no earlier holder to go back to.",
        f"See: regraft adapters history {adapter.name}",
    )


def moves(session: Session, adapter: Adapter, alias: str) -> Sequence[Promotion]:
    """The log of what really moved the alias, oldest first."""
    query = select(Promotion).where(
        Promotion.adapter_id == adapter.id, Promotion.alias == alias, Promotion.decision != Decision.REFUSED
    )
    return session.scalars(query.order_by(Promotion.id)).unique().all()


def leave_to_fsck(database: Database, entry: int) -> None:
    """Leave an announced mirroring open for the next fsck, which need not wait for this process to end."""
    with database.writing() as session:
        journal.abandon(session, entry)


def mirror(database: Database, tracking: Tracking, adapter: str, alias: str, entry: int | None = None) -> None:
    """Bring MLflow's copy of an alias in step with the deciding one, and close the journal entry that asked for it.

    MLflow cannot compare and swap, so whoever wrote there last looks again whether the alias has moved meanwhile.
    """
    written = None
    while True:
        with database.reading() as session:
            row = session.scalars(
                select(Alias).join(Alias.adapter).where(Adapter.name == adapter, Alias.alias == alias)
            ).one()
        if row.generation == written:
            break
        assert row.version.mlflow_version is not None, "an alias points at a ready version"
        tracking.set_alias(adapter, alias, row.version.mlflow_version)
        written = row.generation
    if entry is not None:
        with database.writing() as session:
            journal.close(session, entry, JournalState.DONE)
