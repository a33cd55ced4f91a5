"""Finding versions: by address, by adapter, by what is known of them."""

from difflib import get_close_matches

from sqlalchemy import and_, case, func, or_, select
from sqlalchemy.orm import Session

from infra.errors import Conflict, CorruptArtifact, InvalidInput, NotFound
from registry import base_models
from registry.addresses import Address
from registry.models import Adapter, Alias, BaseModel, Version, VersionState
from registry.records import AdapterSummary

VISIBLE = (VersionState.READY, VersionState.RETIRED)


def find(session: Session, address: Address | str) -> Version:
    """The version at that address; a bare name means the production holder, else the newest ready version.

    Raises:
        NotFound: no such adapter, version or alias; the remedy lists what there is.
        InvalidInput: not an address.
    """
    if isinstance(address, str):
        address = Address.parse(address)
    adapter = find_adapter(session, address.adapter)
    query = select(Version).where(Version.adapter_id == adapter.id)
    pointed = select(Alias.version_id).where(Alias.adapter_id == adapter.id)
    if address.number is not None:
        found = session.scalar(query.where(Version.number == address.number))
    elif address.alias is not None:
        found = session.scalar(query.where(Version.id.in_(pointed.where(Alias.alias == address.alias))))
    else:
        in_production = Version.id.in_(pointed.where(Alias.alias == "production"))
        found = session.scalar(
            query.where(or_(in_production, Version.state == VersionState.READY))
            .order_by(case((in_production, 0), else_=1), Version.number.desc())
            .limit(1)
        )
    if found is None:
        numbers = session.scalars(
            select(Version.number).where(Version.adapter_id == adapter.id, Version.state.in_(VISIBLE))
        )
        aliases = session.scalars(select(Alias.alias).where(Alias.adapter_id == adapter.id).order_by(Alias.alias))
        known = ", ".join(f"{adapter.name}@{pointer}" for pointer in [*sorted(numbers), *aliases])
        raise NotFound(f"There is no version {address}.", f"There are: {known}." if known else "It has no version yet.")
    return found


def find_adapter(session: Session, name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        NotFound: there is none; the remedy names a close one.
    """
    adapter = session.scalar(select(Adapter).where(Adapter.name == name))
    if adapter is None:
        close = get_close_matches(name, session.scalars(select(Adapter.name)).all(), n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise NotFound(f"There is no adapter {name!r}.", f"{hint}See: regraft adapters list")
    return adapter


def of_adapter(session: Session, name: str) -> list[Version]:
    """An adapter's ready and retired versions, newest first."""
    adapter = find_adapter(session, name)
    query = select(Version).where(Version.adapter_id == adapter.id, Version.state.in_(VISIBLE))
    return list(session.scalars(query.order_by(Version.number.desc())).unique())


def search(
    session: Session,
    *,
    text: str | None = None,
    task: str | None = None,
    base: str | None = None,
    method: str | None = None,
    alias: str | None = None,
    state: str | None = None,
) -> list[Version]:
    """Versions that fit every criterion given, by adapter and newest first.

    Args:
        session: a session.
        text: anywhere in the adapter's name, task or description, whatever the case.
        task: the adapter's task.
        base: name, reference or identity of the base model.
        method: as `lora`.
        alias: one that points at the version.
        state: `pending`, `ready`, `failed` or `retired`; without it, what can be seen: ready and retired.

    Raises:
        NotFound: no such base model.
        InvalidInput: no such state.
    """
    query = select(Version).join(Version.adapter)
    if text is not None:
        fields = (Adapter.name, Adapter.task, Adapter.description)
        query = query.where(or_(*(field.icontains(text, autoescape=True) for field in fields)))
    if task is not None:
        query = query.where(Adapter.task == task)
    if base is not None:
        query = query.where(Version.base_model_id == base_models.find(session, base).id)
    if method is not None:
        query = query.where(Version.method == method)
    if alias is not None:
        query = query.where(Version.id.in_(select(Alias.version_id).where(Alias.alias == alias)))
    query = query.where(Version.state.in_(VISIBLE) if state is None else Version.state == _state(state))
    return list(session.scalars(query.order_by(Adapter.name, Version.number.desc())).unique())


def summaries(session: Session) -> list[AdapterSummary]:
    """One line per adapter that has something to show, by name, in a single query."""
    ready = (
        select(Version.adapter_id, func.max(Version.number).label("newest"), func.count().label("versions"))
        .where(Version.state == VersionState.READY)
        .group_by(Version.adapter_id)
        .subquery()
    )
    holder = select(Version.id, Version.number).subquery()
    rows = session.execute(
        select(
            Adapter.name,
            Adapter.task,
            Adapter.description,
            ready.c.versions,
            Version.number,
            BaseModel.name,
            Version.method,
            Version.size_bytes,
            Version.created_at,
            Alias.alias,
            holder.c.number,
        )
        .join(ready, ready.c.adapter_id == Adapter.id)
        .join(Version, and_(Version.adapter_id == Adapter.id, Version.number == ready.c.newest))
        .join(BaseModel, BaseModel.id == Version.base_model_id)
        .outerjoin(Alias, Alias.adapter_id == Adapter.id)
        .outerjoin(holder, holder.c.id == Alias.version_id)
        .order_by(Adapter.name, Alias.alias)
    )
    found: dict[str, AdapterSummary] = {}
    for name, task, description, versions, newest, base, method, size, at, alias, number in rows:
        summary = AdapterSummary(name, task, description, versions, newest, base, method, size, {}, at)
        aliases = found.setdefault(name, summary).aliases
        if alias is not None:
            aliases[alias] = number
    return list(found.values())


def is_adapter(session: Session, name: str) -> bool:
    """Whether there is an adapter of that name."""
    return session.scalar(select(Adapter.id).where(Adapter.name == name)) is not None


def retire(version: Version) -> None:
    """Take a version out of use, under the writers' lock.

    Raises:
        Conflict: an alias points at it, or it never was ready.
    """
    if version.aliases:
        held = ", ".join(alias.alias for alias in version.aliases)
        remedy = f"Promote another version first, or: regraft rollback {version.adapter.name}"
        raise Conflict(f"{version.address} serves as {held} and cannot be retired.", remedy)
    if version.state not in VISIBLE:
        raise Conflict(f"{version.address} is {version.state}; only a ready version can be retired.")
    version.state = VersionState.RETIRED


def require_loadable(version: Version) -> None:
    """Make sure that a version's bytes may be used.

    Raises:
        Conflict: it is pending or failed.
    """
    if version.state not in VISIBLE:
        why = f": {version.failure}" if version.failure else ""
        raise Conflict(f"{version.address} is {version.state} and cannot be loaded{why}.", "See: regraft fsck")


def corrupt(session: Session, version: Version, error: CorruptArtifact) -> CorruptArtifact:
    """The error for a version whose bytes have changed: what it is, what goes on serving, how to mend it."""
    query = select(Alias).where(Alias.adapter_id == version.adapter_id, Alias.version_id != version.id)
    still = "".join(f" {row.alias} still serves {row.version.address}." for row in session.scalars(query).unique())
    return CorruptArtifact(
        f"{version.address} fails its checksum: {error.what} It will not be loaded.{still}",
        "Restore it with: regraft fsck --repair --from URL",
    )


def _state(text: str) -> VersionState:
    try:
        return VersionState(text)
    except ValueError:
        raise InvalidInput(f"{text!r} is not a state.", f"States: {', '.join(VersionState)}.") from None
