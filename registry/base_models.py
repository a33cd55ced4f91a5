"""Base models: registered once per content, found by name, reference or the beginning of their identity."""

import re
from datetime import UTC, datetime
from difflib import get_close_matches

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from infra.errors import BaseModelMismatch, Conflict, InvalidInput, NotFound
from registry.addresses import adapter_name
from registry.models import BaseModel, Version, VersionState
from registry.records import VersionRecord, short

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{6,64}")


def register(
    session: Session,
    reference: str,
    identity_sha256: str,
    *,
    name: str | None,
    family: str,
    parameters: int,
    revision: str | None,
) -> BaseModel:
    """The base model of that identity; added if it is new.

    Raises:
        Conflict: the name belongs to another identity.
        InvalidInput: a malformed name or identity, or no parameters.
    """
    if not _SHA256.fullmatch(identity_sha256):
        raise InvalidInput(f"{identity_sha256!r} is not the identity of a base model.", "It has 64 hexadecimal digits.")
    if parameters < 1:
        raise InvalidInput(f"The base model {reference} is said to have {parameters} parameters.")
    name = adapter_name(name or _name_from(reference))
    if known := session.scalar(select(BaseModel).where(BaseModel.identity_sha256 == identity_sha256)):
        return known
    if taken := session.scalar(select(BaseModel).where(BaseModel.name == name)):
        raise Conflict(
            f"The name {name} belongs to {taken.reference} with identity {short(taken.identity_sha256)}; "
            f"{reference} has identity {short(identity_sha256)}.",
            f"Give it another name: regraft base add {reference} --name NAME",
        )
    row = BaseModel(
        name=name,
        reference=reference,
        identity_sha256=identity_sha256,
        family=family,
        parameters=parameters,
        revision=revision,
    )
    session.add(row)
    session.flush()
    return row


def find(session: Session, key: str) -> BaseModel:
    """The base model with that name, reference, or identity (at least its first six digits).

    Raises:
        NotFound: there is none.
        Conflict: a reference or prefix fits several.
    """
    matches = or_(BaseModel.name == key, BaseModel.reference == key)
    if _PREFIX.fullmatch(key):
        matches = or_(matches, BaseModel.identity_sha256.startswith(key))
    rows = session.scalars(select(BaseModel).where(matches)).all()
    rows = [row for row in rows if row.name == key] or rows
    if len(rows) == 1:
        return rows[0]
    if rows:
        fitting = ", ".join(f"{row.name} ({short(row.identity_sha256)})" for row in rows)
        raise Conflict(f"{key!r} fits several base models: {fitting}.", "Use the name.")
    close = get_close_matches(key, session.scalars(select(BaseModel.name)).all(), n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise NotFound(
        f"There is no base model {key!r}.",
        f"{hint}See: regraft base list. Add "
        + (f"it: regraft base add {key}" if ":" in key else f"one: regraft base add REFERENCE --name {key}"),
    )


def deprecate(session: Session, name: str, successor: str | None) -> list[Version]:
    """Mark a base model as retired; returns the ready versions that stand on it, oldest first.

    Raises:
        InvalidInput: it would be its own successor, or the successor is deprecated itself.
    """
    base = find(session, name)
    if successor is not None:
        heir = find(session, successor)
        if heir.id == base.id or heir.deprecated_at is not None:
            why = "is the same base model" if heir.id == base.id else "is deprecated itself"
            raise InvalidInput(f"{heir.name} cannot succeed {base.name}: it {why}.", "Name another: regraft base list")
        base.successor_id = heir.id
    base.deprecated_at = base.deprecated_at or datetime.now(UTC)
    return stranded(session, base.id)


def stranded(session: Session, base_id: int) -> list[Version]:
    """The ready versions on that base model."""
    query = (
        select(Version)
        .where(Version.base_model_id == base_id, Version.state == VersionState.READY)
        .order_by(Version.adapter_id, Version.number)
    )
    return list(session.scalars(query).unique())


def mismatch(session: Session, version: VersionRecord, identity_sha256: str) -> BaseModelMismatch:
    """The error for a version that meets a base model other than its own; names both."""
    asked = session.scalar(select(BaseModel.name).where(BaseModel.identity_sha256 == identity_sha256))
    other = (
        f"{asked} (identity {short(identity_sha256)})" if asked else f"a base with identity {short(identity_sha256)}"
    )
    return BaseModelMismatch(
        f"{version.address} was trained on {version.base}; you asked for {other}.",
        f"Use it on {version.base.name}, or migrate it: regraft migrate {version.address} --to {asked or 'BASE'}",
    )


def _name_from(reference: str) -> str:
    """A name from the last part of a reference: `hf:HuggingFaceTB/SmolLM2-135M@main` gives `smollm2-135m`."""
    last = reference.partition(":")[2].rstrip("/").rpartition("/")[2].partition("@")[0].removesuffix(".gguf")
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:63]
