"""Sets of rows that were chosen and are kept: `NAME@1`, `NAME@2`, …"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from infra.documents import did_you_mean
from infra.errors import InvalidInput, NotFound
from registry.addresses import Address, adapter_name
from registry.artifacts import ArtifactStore, Manifest
from registry.database import Database
from registry.keeping import Keeping
from registry.models import Dataset, DatasetVersion, Version
from registry.versions import VISIBLE

KIND = "keep data"


def keep(
    database: Database,
    store: ArtifactStore,
    name: str,
    directory: Path,
    *,
    fingerprint: str,
    rows: int,
    origin: Mapping[str, Any],
) -> int:
    """Make a directory the next version of a data set, or find the one that has its rows and its origin; the row's id.

    Raises:
        InvalidInput: not a name, or a directory that is empty or holds a link or a special file.
        Conflict: the directory changed meanwhile.
    """
    adapter_name(name)
    with database.reading() as session:
        same = select(DatasetVersion).where(
            DatasetVersion.name == name, DatasetVersion.fingerprint == fingerprint, DatasetVersion.ready
        )
        for row in session.scalars(same):
            if row.origin == origin:
                return row.id

    def made(session: Session, manifest: Manifest) -> DatasetVersion:
        newest = session.scalar(select(func.max(DatasetVersion.number)).where(DatasetVersion.name == name))
        return DatasetVersion(
            name=name,
            number=(newest or 0) + 1,
            fingerprint=fingerprint,
            rows=rows,
            origin=dict(origin),
            artifact_sha256=manifest.sha256,
            size_bytes=manifest.size_bytes,
        )

    return keeping(database, store).keep(directory, f"a version of the data set {name}", made)


def keeping(database: Database, store: ArtifactStore) -> Keeping[DatasetVersion]:
    """The steps of keeping one."""
    return Keeping(database, store, DatasetVersion, KIND)


def named(row: DatasetVersion) -> str:
    """What it is called in messages."""
    return f"data set {row.address}"


def find(session: Session, address: str) -> DatasetVersion:
    """The one at `NAME@2`, or the newest of `NAME`.

    Raises:
        InvalidInput: not an address of a data set.
        NotFound: there is none.
    """
    wanted = Address.parse(address)
    if wanted.alias is not None:
        raise InvalidInput(f"{address!r} is not the address of a data set.", "An address is NAME or NAME@NUMBER.")
    ready = select(DatasetVersion).where(DatasetVersion.ready)
    query = ready.where(DatasetVersion.name == wanted.adapter).order_by(DatasetVersion.number.desc())
    found = list(session.scalars(query))
    if not found:
        names = sorted(set(session.scalars(select(DatasetVersion.name).where(DatasetVersion.ready))))
        hint = f"{did_you_mean(wanted.adapter, names)} " if names else ""
        raise NotFound(
            f"There is no data set {wanted.adapter!r}.", f"{hint}See: regraft data list. Make one: regraft data select"
        )
    for row in found:
        if wanted.number in (None, row.number):
            return row
    raise NotFound(
        f"There is no data set {wanted}.", f"There are: {', '.join(row.address for row in reversed(found))}."
    )


def trained_on(session: Session, row: DatasetVersion) -> list[Version]:
    """The versions that were trained on rows of it, oldest first."""
    query = (
        select(Version)
        .join(Dataset, Dataset.id == Version.dataset_id)
        .where(Dataset.drawn_from_id == row.id, Version.state.in_(VISIBLE))
    )
    return list(session.scalars(query.order_by(Version.id)).unique())
