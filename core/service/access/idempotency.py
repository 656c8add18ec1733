"""What was answered to a POST with an Idempotency-Key, kept for a day: the same request again gets the same answer.

A job's submission writes its key in the transaction that writes the job (core/service/jobs/submission.py): that one is exact even where
the process dies. For every other POST the key is taken before the request is handled and the answer noted after it.
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
_LOCKED_S = 120.0  #: seconds after which a request counts as dead: its process died
_columns = idempotency_keys.c


@dataclass(frozen=True)
class Begun:
    """The right to handle a request: nobody else handles the same one meanwhile."""

    tenant_id: str
    key: str
    attempt_id: str


@dataclass(frozen=True)
class Answered:
    """The stored answer. `body` is None where it held a secret, which is never stored."""

    status: int
    headers: Mapping[str, str]
    body: bytes | None


class IdempotencyBook:
    """Keys of all tenants; each has its own. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert

    def begin(self, tenant_id: str, key: str, fingerprint: str) -> Begun | Answered:
        """Raises idempotency_mismatch for another request, conflict while the same one is being handled."""
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
        """The request was refused: it did nothing, and may be sent again, mended, under the same key."""
        with statement(self._engine) as connection:
            connection.execute(delete(idempotency_keys).where(*_held(begun)))

    def prune(self, older_than_s: float = KEPT_S) -> int:
        """Those of schedules' runs stay with their jobs: a run may be decided much later than it was begun."""
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
