"""Finds where tables, artifact store and MLflow disagree, and brings them together again.

Work that was cut short is completed where its bytes are durable, else undone. Nothing that was ready is ever given up:
a damaged artifact is restored from a copy or reported. Work that a live process is busy with is left alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from sqlalchemy import select

from infra.errors import NotFound, RegraftError
from registry import aliases, attachments, dataset_versions, journal, registration
from registry.addresses import alias_name
from registry.artifact_use import delete_if_unused, used_artifacts
from registry.artifacts import ArtifactStore
from registry.database import Database
from registry.keeping import Keeping, Row
from registry.models import (
    Adapter,
    Alias,
    Attachment,
    DatasetVersion,
    Decision,
    JournalEntry,
    JournalState,
    Version,
    VersionState,
)
from registry.registration import Registration
from registry.tracking import Tracking, artifact_source
from registry.versions import VISIBLE

ACTOR = "fsck"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be: which thing, what is wrong, what mends it, and whether that was done."""

    subject: str
    problem: str
    repair: str
    repaired: bool


@dataclass(frozen=True, slots=True)
class _Fault:
    subject: str
    problem: str
    repair: str
    mend: Callable[[], object] | None


@dataclass(frozen=True, slots=True)
class Fsck:
    """One examination of the three stores.

    Args:
        database: the tables.
        store: the artifacts.
        tracking: MLflow.
        source: a copy of the store to restore damaged artifacts from.
        deep: read and hash every byte; else only look whether the artifacts are there.
        adopt_mlflow: take over aliases that were moved by hand in MLflow, instead of moving them back.
        protected: aliases whose adoption is recorded as forced.
    """

    database: Database
    store: ArtifactStore
    tracking: Tracking
    source: ArtifactStore | None = None
    deep: bool = True
    adopt_mlflow: bool = False
    protected: tuple[str, ...] = ()

    def run(self, *, repair: bool) -> list[Finding]:
        """Examine everything; with `repair`, mend each fault before looking for the next."""
        findings = []
        for fault in self._faults():
            repaired, note = False, fault.repair
            if repair and fault.mend is not None:
                try:
                    fault.mend()
                    repaired = True
                except RegraftError as error:
                    note = f"{fault.repair}: {error.what}"
            findings.append(Finding(fault.subject, fault.problem, note, repaired))
        if repair and (swept := self.store.sweep()):
            findings.append(Finding(self.store.url, f"{swept} leftovers of interrupted work", "remove them", True))
        return findings

    def _faults(self) -> Iterator[_Fault]:
        yield from self._interrupted_registrations()
        yield from self._interrupted_keeping(attachments.keeping(self.database, self.store), attachments.named)
        yield from self._interrupted_keeping(
            dataset_versions.keeping(self.database, self.store), dataset_versions.named
        )
        yield from self._orphan_artifacts()
        yield from self._damaged_artifacts()
        yield from self._model_versions()
        yield from self._aliases_of_unready_versions()
        yield from self._interrupted_moves()
        yield from self._drifted_aliases()

    # ---- registrations

    def _interrupted_registrations(self) -> Iterator[_Fault]:
        with self.database.reading() as session:
            entries = journal.open_entries(session, registration.KIND)
            announced = {entry.payload["version_id"]: entry for entry in entries}
            pending = session.scalars(select(Version).where(Version.state == VersionState.PENDING)).unique()
            work = {version.id: version for version in pending}
            work |= {identity: session.get_one(Version, identity) for identity in announced}
        for version in work.values():
            entry = announced.get(version.id)
            if entry is not None and not journal.is_abandoned(entry):
                continue
            pending_still, sha256 = version.state is VersionState.PENDING, version.artifact_sha256
            if pending_still and self.store.contains(sha256) and not self._problems(sha256):
                how, mend = "complete it: its bytes are whole", self._complete
            else:
                how, mend = "undo it: its bytes were never stored", self._undo
            problem = "was interrupted while it was being registered"
            yield _Fault(version.address, problem, how, partial(mend, version, entry))

    def _complete(self, version: Version, entry: JournalEntry | None) -> None:
        self._registration.complete(version.id, self._entry(version, entry))

    def _undo(self, version: Version, entry: JournalEntry | None) -> None:
        reason = version.failure or "interrupted before its bytes were stored"
        self._registration.undo(version.id, self._entry(version, entry), reason)

    def _entry(self, version: Version, entry: JournalEntry | None) -> int:
        if entry is not None:
            return entry.id
        with self.database.writing() as session:
            return journal.announce(session, registration.KIND, {"version_id": version.id, "address": version.address})

    @property
    def _registration(self) -> Registration:
        return Registration(self.database, self.store, self.tracking)

    # ---- attachments and data sets

    def _interrupted_keeping(self, keeping: Keeping[Row], subject: Callable[[Row], str]) -> Iterator[_Fault]:
        with self.database.reading() as session:
            entries = journal.open_entries(session, keeping.kind)
            work = [(entry, session.get_one(keeping.table, entry.payload[keeping.key])) for entry in entries]
        for entry, row in work:
            if not journal.is_abandoned(entry):
                continue
            if self.store.contains(row.artifact_sha256) and not self._problems(row.artifact_sha256):
                how, mend = "complete it: its bytes are whole", keeping.complete
            else:
                how, mend = "undo it: its bytes were never stored", keeping.undo
            yield _Fault(subject(row), "was interrupted while it was being kept", how, partial(mend, row.id, entry.id))

    # ---- artifacts

    def _orphan_artifacts(self) -> Iterator[_Fault]:
        with self.database.reading() as session:
            used = used_artifacts(session)
            failed = set(session.scalars(select(Version.artifact_sha256).where(Version.state == VersionState.FAILED)))
        for sha256 in sorted(failed - used):
            if self.store.contains(sha256):
                problem = "belongs to a registration that failed"
                yield _Fault(f"artifact {sha256[:12]}…", problem, "delete it", partial(self._delete, sha256))

    def _delete(self, sha256: str) -> None:
        with self.database.writing() as session:
            delete_if_unused(session, self.store, sha256)

    def _damaged_artifacts(self) -> Iterator[_Fault]:
        needed = [(version.address, version.artifact_sha256) for version in self._visible()]
        with self.database.reading() as session:
            rows = session.scalars(select(Attachment).where(Attachment.ready).order_by(Attachment.id)).unique()
            needed += [(attachments.named(row), row.artifact_sha256) for row in rows]
            kept = session.scalars(select(DatasetVersion).where(DatasetVersion.ready).order_by(DatasetVersion.id))
            needed += [(dataset_versions.named(row), row.artifact_sha256) for row in kept]
        for subject, sha256 in needed:
            if problems := self._problems(sha256):
                mend, how = None, "give a copy of the store: regraft fsck --repair --from URL"
                if self.source is not None:
                    mend, how = partial(self._restore, sha256, self.source), f"restore it from {self.source.url}"
                yield _Fault(subject, "; ".join(problems), how, mend)

    def _problems(self, sha256: str) -> list[str]:
        if self.deep:
            return self.store.verify(sha256)
        return [] if self.store.contains(sha256) else [f"artifact {sha256[:12]}… is not in {self.store.url}"]

    def _restore(self, sha256: str, source: ArtifactStore) -> None:
        self.store.repair(sha256, source)
        if problems := self.store.verify(sha256):
            raise NotFound("; ".join(problems))

    # ---- MLflow's model versions

    def _model_versions(self) -> Iterator[_Fault]:
        for adapter in self._adapters():
            known = self.tracking.versions(adapter)
            for version in self._visible(adapter):
                number = known.get(version.uid)
                if number is None:
                    problem, how = "has no model version in MLflow", "record it again"
                elif number != version.mlflow_version:
                    problem, how = (
                        f"is version {number} in MLflow, not {version.mlflow_version}",
                        "take over the number",
                    )
                else:
                    continue
                yield _Fault(version.address, problem, how, partial(self._record, version))
            with self.database.reading() as session:
                query = select(Version).join(Version.adapter).where(Adapter.name == adapter)
                failed = session.scalars(query.where(Version.state == VersionState.FAILED)).unique().all()
            for version in failed:
                if version.uid in known:
                    problem = "failed, but has a model version in MLflow"
                    mend = partial(self.tracking.delete_version, adapter, version.uid)
                    yield _Fault(version.address, problem, "delete it there", mend)

    def _record(self, version: Version) -> None:
        number = self.tracking.ensure_version(
            version.adapter.name,
            version.uid,
            source=artifact_source(version.artifact_sha256),
            run_id=version.mlflow_run_id,
            tags=registration.version_tags(version),
        )
        with self.database.writing() as session:
            session.get_one(Version, version.id).mlflow_version = number

    # ---- aliases

    def _aliases_of_unready_versions(self) -> Iterator[_Fault]:
        for alias in self._alias_rows():
            if alias.version.state is not VersionState.READY:
                subject = f"{alias.adapter.name}@{alias.alias}"
                problem = f"points at {alias.version.address}, which is {alias.version.state}"
                yield _Fault(subject, problem, "go back to its previous holder", partial(self._roll_back, alias))

    def _roll_back(self, alias: Alias) -> None:
        reason = f"{alias.version.address} is {alias.version.state}"
        with self.database.writing() as session:
            previous, generation = aliases.previous_holder(session, alias.adapter, alias.alias)
            wish = aliases.Move(alias.alias, Decision.ROLLED_BACK, ACTOR, reason)
            _, entry = aliases.move(session, previous, wish, generation)
        aliases.mirror(self.database, self.tracking, alias.adapter.name, alias.alias, entry)

    def _interrupted_moves(self) -> Iterator[_Fault]:
        with self.database.reading() as session:
            entries = journal.open_entries(session, aliases.KIND)
        for entry in entries:
            if journal.is_abandoned(entry):
                subject = f"{entry.payload['adapter']}@{entry.payload['alias']}"
                yield _Fault(subject, "moved, but MLflow was not told", "tell it", partial(self._mirror, entry))

    def _mirror(self, entry: JournalEntry) -> None:
        aliases.mirror(self.database, self.tracking, entry.payload["adapter"], entry.payload["alias"], entry.id)

    def _drifted_aliases(self) -> Iterator[_Fault]:
        with self.database.reading() as session:
            moving = {(e.payload["adapter"], e.payload["alias"]) for e in journal.open_entries(session, aliases.KIND)}
        ours: dict[str, dict[str, Alias]] = {}
        for held in self._alias_rows():
            ours.setdefault(held.adapter.name, {})[held.alias] = held
        for adapter in self._adapters():
            theirs = self.tracking.aliases(adapter)
            here = ours.get(adapter, {})
            by_number = {version.mlflow_version: version for version in self._visible(adapter)}
            for alias in sorted(here.keys() | theirs.keys()):
                row, there = here.get(alias), by_number.get(theirs.get(alias))
                if (adapter, alias) in moving or (row is not None and row.version.mlflow_version == theirs.get(alias)):
                    continue
                if row is None and there is None:
                    continue  # an alias on a model version that is not this registry's
                where = there.address if there else "a version that is not ours" if alias in theirs else "nothing"
                expected = row.version.address if row else "unset"
                problem = f"is {where} in MLflow, {expected} here"
                mend: Callable[[], object]
                if self.adopt_mlflow and there is not None:
                    how, mend = f"adopt {where}", partial(self._adopt, alias, there, row)
                elif row is not None:
                    how, mend = f"restore {expected} in MLflow", partial(self._restore_alias, adapter, alias)
                else:
                    how, mend = "remove it from MLflow", partial(self.tracking.delete_alias, adapter, alias)
                yield _Fault(f"{adapter}@{alias}", problem, how, mend)

    def _adopt(self, alias: str, version: Version, row: Alias | None) -> None:
        decision = Decision.FORCED if alias in self.protected else Decision.MOVED
        wish = aliases.Move(alias_name(alias), decision, ACTOR, "moved by hand in MLflow, adopted by fsck")
        with self.database.writing() as session:
            fresh = session.get_one(Version, version.id)
            _, entry = aliases.move(session, fresh, wish, row.generation if row else 0)
            journal.close(session, entry, JournalState.DONE)

    def _restore_alias(self, adapter: str, alias: str) -> None:
        aliases.mirror(self.database, self.tracking, adapter, alias)

    # ----

    def _adapters(self) -> list[str]:
        with self.database.reading() as session:
            return list(session.scalars(select(Adapter.name).order_by(Adapter.name)))

    def _visible(self, adapter: str | None = None) -> list[Version]:
        with self.database.reading() as session:
            query = select(Version).join(Version.adapter).where(Version.state.in_(VISIBLE))
            query = query.where(Adapter.name == adapter) if adapter else query
            return list(session.scalars(query.order_by(Version.id)).unique())

    def _alias_rows(self) -> list[Alias]:
        with self.database.reading() as session:
            return list(session.scalars(select(Alias).order_by(Alias.adapter_id, Alias.alias)).unique())
