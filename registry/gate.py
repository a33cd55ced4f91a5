"""The ways an alias moves: promotion through the gate, by force, by hand where there is no gate, and back."""

import logging
from dataclasses import dataclass

from infra.errors import GateRefused, InvalidInput, ServiceUnavailable
from registry import aliases, evaluations, versions
from registry.aliases import Move
from registry.database import Database
from registry.models import Decision
from registry.policy import Policy
from registry.promotion import Verdict, decide
from registry.records import PromotionRecord
from registry.tracking import Tracking

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gate:
    """Moves aliases in the tables, which decide, and then in MLflow.

    Args:
        database: the tables.
        tracking: MLflow.
        protected: aliases that move only through a passing verdict, or by force with a reason.
    """

    database: Database
    tracking: Tracking
    protected: tuple[str, ...]

    def judge(self, address: str, alias: str, policy: Policy) -> Verdict:
        """See `AdapterRegistry.judge`."""
        with self.database.reading() as session:
            candidate = versions.find(session, address)
            holder = aliases.holder_of(session, candidate.adapter, alias)
            return decide(
                policy,
                candidate=candidate.address,
                alias=alias,
                measured=evaluations.of_version(session, candidate),
                holder=holder.version.address if holder else None,
                holder_measured=evaluations.of_version(session, holder.version) if holder else (),
                generation=holder.generation if holder else 0,
                trained_on=candidate.dataset.fingerprint if candidate.dataset else None,
            )

    def promote(
        self,
        address: str,
        alias: str,
        verdict: Verdict | None,
        *,
        actor: str,
        reason: str | None,
        force: bool,
        expected_generation: int | None,
    ) -> PromotionRecord:
        """See `AdapterRegistry.promote`."""
        require_reason(force, reason)
        if verdict is None and not force:
            raise InvalidInput(
                f"{address} cannot be promoted to {alias} without a verdict.", "Decide first, or force it."
            )
        generation = expected_generation if verdict is None or expected_generation is not None else verdict.generation
        report = verdict.to_json() if verdict else {}
        refusal = None
        with self.database.writing() as session:
            version = versions.find(session, address)
            holder = aliases.holder_of(session, version.adapter, alias)
            if verdict is not None:
                aliases.require_about(verdict, version, alias)
                if not force:
                    refusal = aliases.refusal_of(session, version, verdict, protected=alias in self.protected)
            if refusal is not None:
                line = aliases.log(
                    session,
                    version,
                    Move(alias, Decision.REFUSED, actor, reason, report),
                    from_version_id=holder.version_id if holder else None,
                    generation=holder.generation if holder else 0,
                )
            else:
                if generation is None:
                    generation = holder.generation if holder else 0
                decision = Decision.FORCED if force else Decision.PROMOTED
                line, entry = aliases.move(session, version, Move(alias, decision, actor, reason, report), generation)
            record = PromotionRecord.of(line)
        if refusal is not None:
            raise refusal
        self._mirror(record, entry)
        return record

    def set_by_hand(self, address: str, alias: str, *, actor: str, reason: str | None) -> PromotionRecord:
        """See `AdapterRegistry.set_alias`."""
        if alias in self.protected:
            raise GateRefused(
                f"{alias} is protected: it moves only through a passing gate.",
                f"regraft promote {address} --to {alias}",
            )
        with self.database.writing() as session:
            version = versions.find(session, address)
            holder = aliases.holder_of(session, version.adapter, alias)
            wish = Move(alias, Decision.MOVED, actor, reason)
            line, entry = aliases.move(session, version, wish, holder.generation if holder else 0)
            record = PromotionRecord.of(line)
        self._mirror(record, entry)
        return record

    def roll_back(self, adapter: str, alias: str, *, actor: str, reason: str | None) -> PromotionRecord:
        """See `AdapterRegistry.rollback`."""
        with self.database.writing() as session:
            row = versions.find_adapter(session, adapter)
            previous, generation = aliases.previous_holder(session, row, alias)
            line, entry = aliases.move(session, previous, Move(alias, Decision.ROLLED_BACK, actor, reason), generation)
            record = PromotionRecord.of(line)
        self._mirror(record, entry)
        return record

    def _mirror(self, record: PromotionRecord, entry: int) -> None:
        """The move is decided and durable; a silent MLflow is told later, by `fsck`."""
        try:
            aliases.mirror(self.database, self.tracking, record.adapter, record.alias, entry)
        except ServiceUnavailable as error:
            aliases.leave_to_fsck(self.database, entry)
            logger.warning(
                "%s@%s is %s, but MLflow was not told: %s Tell it later with: regraft fsck --repair",
                record.adapter,
                record.alias,
                record.to_address,
                error.what,
            )


def require_reason(force: bool, reason: str | None) -> None:
    """Make sure that force comes with a reason.

    Raises:
        InvalidInput: it does not.
    """
    if force and not (reason or "").strip():
        raise InvalidInput("A forced promotion needs a reason; it is kept in the log.", '--force --reason "why"')
