"""API keys: shown only when they are made, stored as a digest, and checked on every request."""

import datetime as dt
import hashlib
import logging
import re
import secrets
import string
import threading
import time
import zlib
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Engine, Update, func, insert, or_, select, update

from nightpress.core.database import db_now, statement, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.tables.access import api_keys

ALL_SCOPES = frozenset(
    {
        "jobs:read",
        "jobs:write",
        "models:read",
        "models:write",
        "workers:read",
        "metrics:read",
        "keys:read",
        "keys:write",
        "webhooks:read",
        "webhooks:write",
        "deliveries:read",
        "deliveries:write",
        "admin",
    }
)

_ID_ALPHABET = string.ascii_lowercase + string.digits
#: np_ + id + "_" + 32 random bytes as base64url + a CRC of all before it. The CRC detects a mistyped or guessed key without the database.
_SHAPE = re.compile(r"np_([a-z0-9]{8})_([A-Za-z0-9_-]{43})([0-9a-f]{6})")
_CACHE_S = 5.0  #: seconds that a revoked key may still work in this process
_CACHE_SIZE = 10_000
_TOUCH_S = 60.0
_TOUCH_WAIT_S = 0.2  #: longest wait for a lock; short, as the request may then wait for the same lock


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Person:
    """Somebody who has signed in by OIDC. `tenants`: all in which the groups allow something."""

    id: str
    name: str
    email: str
    tenants: tuple[str, ...]


@dataclass(frozen=True)
class Principal:
    """The caller of a request, and what its key, or its groups, allow."""

    tenant_id: str
    key_id: str  #: of a person who has signed in: the person's id
    scopes: frozenset[str]
    #: id of the first key in the chain of keys that made this key; all keys of a family together have the limits of a single key
    family: str
    person: Person | None = None  #: None: a key

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes


@dataclass(frozen=True)
class KeyRecord:
    """A key without its secret."""

    id: str
    tenant_id: str
    name: str
    scopes: frozenset[str]
    expires_at: dt.datetime | None


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()) & 0xFFFFFF:06x}"


def _digest(plain: str) -> str:
    return hashlib.sha256(plain.encode()).hexdigest()


def create_key(
    engine: Engine,
    *,
    tenant_id: str = "default",
    name: str,
    scopes: Collection[str],
    expires_at: dt.datetime | None = None,
    rotated_from: str | None = None,
    made_by: str | None = None,
    family: str | None = None,
) -> tuple[KeyRecord, str]:
    """Make a key. The second value is the key's plain text, which can't be read again. `family` None: the key begins a new family.

    Raises NightpressError(invalid_request) for a scope that doesn't exist.
    """
    unknown = sorted(set(scopes) - ALL_SCOPES)
    if unknown or not scopes:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"There is no scope {', '.join(unknown)}." if unknown else "A key needs at least one scope.",
            hint=f"There are: {', '.join(sorted(ALL_SCOPES))}.",
        )
    record = KeyRecord(
        "".join(secrets.choice(_ID_ALPHABET) for _ in range(8)), tenant_id, name, frozenset(scopes), expires_at
    )
    body = f"np_{record.id}_{secrets.token_urlsafe(32)}"
    plain = body + _checksum(body)
    with statement(engine) as connection:
        connection.execute(
            insert(api_keys).values(
                id=record.id,
                tenant_id=tenant_id,
                name=name,
                digest=_digest(plain),
                scopes=sorted(record.scopes),
                created_at=db_now(),
                expires_at=expires_at,
                rotated_from=rotated_from,
                made_by=made_by,
                family=family,
            )
        )
    return record, plain


def revoke(engine: Engine, key_id: str) -> bool:
    """Revoke a key. Other processes notice within five seconds. False: there is no such key, or it was revoked before."""
    ended = update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None)).values(revoked_at=db_now())
    with statement(engine) as connection:
        return connection.execute(ended).rowcount == 1


class KeyRing:
    """Checks keys. Valid keys are cached for a few seconds, invalid keys never. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        #: key's id → monotonic time of the next write of its use, so that only one request waits for a lock
        self._touch_at: dict[str, float] = {}
        self._known: dict[str, tuple[Principal, float]] = {}  #: keyed by digest, so that no plain key stays in memory

    def cached(self, plain: str) -> Principal | None:
        """The key's principal if it was checked within the last seconds, without SQL; else None."""
        found = self._known.get(_digest(plain))
        return found[0] if found is not None and time.monotonic() < found[1] else None

    def authenticate(self, plain: str) -> Principal:
        """The principal of this key. Raises NightpressError(unauthenticated), with the same message for every reason."""
        shape = _SHAPE.fullmatch(plain)
        if shape is None or not secrets.compare_digest(_checksum(plain[:-6]), shape[3]):
            raise _refused()
        known = self.cached(plain)
        if known is not None:
            return known
        principal = self._look_up(shape[1], _digest(plain))
        with self._lock:
            if len(self._known) >= _CACHE_SIZE:
                self._known.clear()
            self._known[_digest(plain)] = (principal, time.monotonic() + _CACHE_S)
        return principal

    def _look_up(self, key_id: str, digest: str) -> Principal:
        columns = api_keys.c
        is_live = (columns.revoked_at.is_(None), or_(columns.expires_at.is_(None), columns.expires_at > db_now()))
        untouched = or_(columns.last_used_at.is_(None), columns.last_used_at < db_now(-_TOUCH_S))
        family = func.coalesce(columns.family, columns.id).label("family")
        query = select(columns.tenant_id, columns.digest, columns.scopes, family, untouched.label("untouched")).where(
            columns.id == key_id, *is_live
        )
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        # Compare even if there is no such key, so that the answer takes the same time.
        if not secrets.compare_digest(row.digest if row else "", digest) or row is None:
            raise _refused()
        if row.untouched and time.monotonic() >= self._touch_at.get(key_id, 0.0):
            self._touch(update(api_keys).where(columns.id == key_id, untouched).values(last_used_at=db_now()), key_id)
        return Principal(row.tenant_id, key_id, frozenset(row.scopes), row.family)

    def _touch(self, note: Update, key_id: str) -> None:
        """Write when a key was used. A failure is only logged: requests that read must work while the database takes no writes."""
        with self._lock:
            if len(self._touch_at) >= _CACHE_SIZE:
                self._touch_at.clear()
            self._touch_at[key_id] = time.monotonic() + _TOUCH_S
        try:
            with transaction(self._engine, lock_wait_s=_TOUCH_WAIT_S) as connection:
                connection.execute(note)
        except NightpressError as error:
            log.warning("the use of key %s was not noted: %s", key_id, error)


def _refused() -> NightpressError:
    return NightpressError(
        ErrorCode.UNAUTHENTICATED,
        "The API key is not valid: unknown, expired or revoked.",
        hint="Send `Authorization: Bearer np_…`. `python -m nightpress.core.service.access create-key` makes a new one.",
    )
