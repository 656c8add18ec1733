"""Stores the answers to POSTs with an Idempotency-Key for a day. The same request again gets the same answer.

The submission of a job writes its key in the transaction that writes the job (core/service/jobs/submission.py), so that it is exact
even if the process dies. For every other POST, the key is reserved before the request is handled, and the answer is stored afterwards.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, delete, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from nightpress.core.database import db_now, statement, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.service.tables.jobs import idempotency_keys

KEPT_S = 24 * 3600.0
_LOCKED_S = 120.0  #: seconds after which an unanswered request counts as dead: its process was killed
_columns = idempotency_keys.c


@dataclass(frozen=True)
class Begun:
    """The right to handle a request. No other process handles the same request at the same time."""

    tenant_id: str
    key: str
    attempt_id: str


@dataclass(frozen=True)
class Answered:
    """The stored answer. `body` is None if it held a secret: secrets are never stored."""

    status: int
    headers: Mapping[str, str]
    body: bytes | None


class IdempotencyBook:
    """The idempotency keys. Each tenant has its own set of keys. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert

    def begin(self, tenant_id: str, key: str, fingerprint: str) -> Begun | Answered:
        """Reserve the key for this request, or return the stored answer. `fingerprint`: a digest of the request.

        Raises idempotency_mismatch if the key belongs to another request, conflict while the same request is being handled.
        """
        begun = Begun(tenant_id, key, new_id("try"))
        mine = {"tenant_id": tenant_id, "key": key, "fingerprint": fingerprint, "attempt_id": begun.attempt_id}
        new = self._insert(idempotency_keys).values(created_at=db_now(), locked_until=db_now(_LOCKED_S), **mine)
        with transaction(self._engine) as connection:
            if connection.execute(new.on_conflict_do_nothing().returning(_columns.key)).one_or_none() is not None:
                return begun
            row = connection.execute(select(idempotency_keys).where(*_named(tenant_id, key))).one_or_none()
            if row is not None and row.fingerprint != fingerprint:
                raise mismatch()
            if row is not None and row.status is not None:
                body = None if row.body is None else zlib.decompress(row.body)
                return Answered(row.status, row.headers, body)
            over = (*_named(tenant_id, key), _columns.status.is_(None), _columns.locked_until < db_now())
            taken = {"attempt_id": begun.attempt_id, "locked_until": db_now(_LOCKED_S)}
            if row is not None and connection.execute(update(idempotency_keys).where(*over).values(**taken)).rowcount:
                return begun
        raise NightpressError(
            ErrorCode.CONFLICT,
            "A request with this idempotency key is still being answered.",
            hint="Wait for its answer, or send the same request again in a moment.",
            retry_after_s=1,
        )

    def answer(self, begun: Begun, answered: Answered) -> None:
        body = None if answered.body is None else zlib.compress(answered.body)
        noted = {"status": answered.status, "headers": dict(answered.headers), "body": body, "locked_until": None}
        with statement(self._engine) as connection:
            connection.execute(update(idempotency_keys).where(*_held(begun)).values(**noted))

    def forget(self, begun: Begun) -> None:
        """Release the key of a request that was refused and changed nothing. A corrected request may use the same key."""
        with statement(self._engine) as connection:
            connection.execute(delete(idempotency_keys).where(*_held(begun)))

    def prune(self, older_than_s: float = KEPT_S) -> int:
        """Delete keys older than `older_than_s` seconds. Returns their number.

        The keys of schedules' runs stay as long as their jobs, because a run may submit its job much later than the run was recorded.
        """
        asked = or_(_columns.job_id.is_(None), _columns.key.not_like("schedule %"))
        with statement(self._engine) as connection:
            return connection.execute(
                delete(idempotency_keys).where(_columns.created_at < db_now(-older_than_s), asked)
            ).rowcount


def mismatch() -> NightpressError:
    return NightpressError(
        ErrorCode.IDEMPOTENCY_MISMATCH,
        "This idempotency key was used for another request.",
        hint="Use a new key for a new request.",
    )


def _named(tenant_id: str, key: str) -> tuple[ColumnElement[bool], ...]:
    return _columns.tenant_id == tenant_id, _columns.key == key


def _held(begun: Begun) -> tuple[ColumnElement[bool], ...]:
    return (*_named(begun.tenant_id, begun.key), _columns.attempt_id == begun.attempt_id, _columns.status.is_(None))
