"""Deliveries of results and their attempts, in SQL."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Engine,
    Row,
    case,
    delete,
    exists,
    insert,
    literal_column,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.engine import Connection

from nightpress.core.database import db_now, lock_until_commit, read_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.paging import newest_first
from nightpress.core.service.claims import Claim
from nightpress.core.service.deliveries.addresses import check_destinations
from nightpress.core.service.deliveries.outbox import add_deliveries
from nightpress.core.service.tables.deliveries import IS_PENDING, deliveries, delivery_attempts
from nightpress.core.service.tables.jobs import job_artifacts, jobs
from nightpress.core.settings import Settings
from nightpress.core.wire.deliveries import DeliveryAttemptView, DeliveryState, ResultDeliveryView

_BUSY_S = 5.0  #: until a delivery is looked at again whose address has another delivery under way
_columns = deliveries.c
_FREE = or_(_columns.claim_until.is_(None), _columns.claim_until < db_now())


@dataclass(frozen=True)
class DueDelivery:
    """A delivery that this process has taken. No other process works on it while the claim holds."""

    id: str
    tenant_id: str
    job_id: str
    artifact: str
    destination: str
    attempts: int  #: including this attempt
    resume: dict[str, Any]
    claim: Claim


class DeliveryStore:
    """Deliveries of all tenants. A method that takes a tenant sees only that tenant's. Safe to share between threads."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    # For users ---------------------------------------------------------------------------------------------------

    def add(
        self, tenant_id: str, job_id: str, destinations: list[str], *, key_id: str | None = None
    ) -> list[ResultDeliveryView]:
        """Deliver the result of an accepted job. Raises not_found, conflict, invalid_request, path_not_allowed."""
        with transaction(self._engine) as connection:
            # Locked, so that retention does not prune the artifacts now.
            query = select(jobs).where(jobs.c.id == job_id, jobs.c.tenant_id == tenant_id).with_for_update()
            job = connection.execute(query).one_or_none()
            if job is None:
                raise NightpressError(ErrorCode.NOT_FOUND, "There is no such job.", hint="GET /v1/jobs lists yours.")
            if job.verdict != "accepted":
                raise NightpressError(
                    ErrorCode.CONFLICT,
                    f"The job is {job.verdict or job.state}; only an accepted result can be delivered.",
                    hint="Its report says which gate it missed." if job.verdict else "Wait for its end.",
                )
            has_some = select(exists().where(job_artifacts.c.job_id == job_id))
            if job.artifacts_state != "kept" or not connection.execute(has_some).scalar_one():
                raise NightpressError(
                    ErrorCode.CONFLICT, "The job's artifacts were pruned.", hint="Run it again: `nightpress retry`."
                )
            check_destinations(destinations, self._settings, model=job.model_name)
            ids = add_deliveries(connection, tenant_id, job.model_name, job_id, destinations, key_id=key_id)
        return [self.get(tenant_id, delivery_id) for delivery_id in ids]

    def page(
        self,
        tenant_id: str,
        *,
        job_id: str | None = None,
        state: DeliveryState | None = None,
        cursor: str | None,
        limit: int,
    ) -> tuple[list[ResultDeliveryView], str | None]:
        query = _views().where(_columns.tenant_id == tenant_id)
        if job_id is not None:
            query = query.where(_columns.job_id == job_id)
        if state is not None:
            query = query.where(_columns.state == state)
        rows, following = newest_first(
            self._engine, query, _columns.created_at, _columns.id, cursor=cursor, limit=limit
        )
        return [_view(row) for row in rows], following

    def get(self, tenant_id: str, delivery_id: str) -> ResultDeliveryView:
        """A delivery with all its attempts. Raises not_found."""
        tries = select(delivery_attempts).where(delivery_attempts.c.delivery_id == delivery_id)
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(_views().where(*_of_tenant(tenant_id, delivery_id))).one_or_none()
            if row is None:
                raise NightpressError(
                    ErrorCode.NOT_FOUND, "There is no such delivery.", hint="GET /v1/deliveries lists yours."
                )
            log = connection.execute(tries.order_by(delivery_attempts.c.number)).all()
        return _view(row, [DeliveryAttemptView(**attempt._mapping) for attempt in log])

    def cancel(self, tenant_id: str, delivery_id: str) -> ResultDeliveryView:
        """pending → cancelled. A running attempt ends within seconds; a settled delivery stays as it is. Raises not_found."""
        with transaction(self._engine) as connection:
            pending = update(deliveries).where(*_of_tenant(tenant_id, delivery_id), IS_PENDING)
            connection.execute(pending.values(state="cancelled", **_SETTLED))
        return self.get(tenant_id, delivery_id)

    def retry(self, tenant_id: str, delivery_id: str) -> ResultDeliveryView:
        """failed | cancelled → pending; of a pending delivery, the next attempt is now. Raises not_found, conflict."""
        again = _columns.state.in_(("failed", "cancelled", "pending"))
        with transaction(self._engine) as connection:
            changed = update(deliveries).where(*_of_tenant(tenant_id, delivery_id), again, _FREE)
            values = {"state": "pending", "next_at": db_now(), "finished_at": null(), "attempts": 0, "error": null()}
            won = connection.execute(changed.values(**values)).rowcount
        view = self.get(tenant_id, delivery_id)
        if not won and not view.running:
            raise NightpressError(
                ErrorCode.CONFLICT,
                f"The delivery is {view.state}.",
                hint="Deliver the job again: `nightpress deliveries add`.",
            )
        return view

    # For the control process -------------------------------------------------------------------------------------

    def take_due(self, *, limit: int, ttl_s: float) -> list[DueDelivery]:
        """Take deliveries that are due, each under a claim of `ttl_s` seconds.

        An address has one delivery under way at a time. A delivery is superseded if its address was given a newer result.
        """
        with transaction(self._engine, read_only=True) as connection:
            # Read first: PostgreSQL searches an index for a value, but not for a function such as clock_timestamp().
            now = read_now(connection)
            due = select(deliveries).where(IS_PENDING, _columns.next_at <= now, _FREE)
            rows = connection.execute(due.order_by(_columns.next_at).limit(limit)).all()
        taken = (self._take(row, ttl_s) for row in rows)
        return [due for due in taken if due is not None]

    def _take(self, row: Row[Any], ttl_s: float) -> DueDelivery | None:
        claim = Claim(row.id, new_id("clm"))
        still = (_columns.id == row.id, IS_PENDING, _FREE, _columns.attempts == row.attempts)
        other = deliveries.alias("other")
        there = (
            other.c.tenant_id == row.tenant_id,
            other.c.destination == row.destination,
            other.c.id != row.id,
        )
        newer = exists().where(
            *there,
            other.c.state.in_(("pending", "delivered")),
            tuple_(other.c.created_at, other.c.id) > tuple_(_columns.created_at, _columns.id),
        )
        busy = exists().where(*there, other.c.state == literal_column("'pending'"), other.c.claim_until >= db_now())
        with transaction(self._engine) as connection:
            # Two processes that take two deliveries to one address at the same time would not see each other's claim.
            lock_until_commit(connection, f"destination/{row.tenant_id}/{row.destination}")
            if connection.execute(update(deliveries).where(*still, busy).values(next_at=db_now(_BUSY_S))).rowcount:
                return None
            old = update(deliveries).where(*still, newer)
            if connection.execute(old.values(state="superseded", error=_NEWER, **_SETTLED)).rowcount:
                return None
            mine = update(deliveries).where(*still)
            values = {"claim_id": claim.claim_id, "claim_until": db_now(ttl_s), "attempts": _columns.attempts + 1}
            if not connection.execute(mine.values(**values)).rowcount:
                return None
        return DueDelivery(
            row.id, row.tenant_id, row.job_id, row.artifact, row.destination, row.attempts + 1, row.resume, claim
        )

    def renew(self, claim: Claim, ttl_s: float) -> bool:
        """Extend a claim. False: it was lost, e.g. because the delivery was cancelled."""
        return self._write(claim, claim_until=db_now(ttl_s), sent_bytes=claim.done)

    def note(self, claim: Claim, resume: dict[str, Any]) -> None:
        """Store what a later attempt goes on from. Raises NightpressError(cancelled) if the claim was lost."""
        if not self._write(claim, resume=resume, sent_bytes=claim.done, total_bytes=claim.total):
            claim.lost.set()
        claim.note(0)

    def release(self, claim: Claim) -> None:
        """End an attempt that was interrupted, without counting it. Another process may go on at once."""
        values = {"claim_id": null(), "claim_until": null(), "next_at": db_now(), "attempts": _columns.attempts - 1}
        self._write(claim, **values)

    def settle(
        self,
        due: DueDelivery,
        *,
        result: dict[str, Any] | None = None,
        error: NightpressError | None = None,
        pause_s: float | None = None,
        duration_s: float,
    ) -> bool:
        """End an attempt: delivered with a result, pending again after `pause_s`, or failed. False: the claim was lost, nothing is written."""
        with transaction(self._engine) as connection:
            mine = update(deliveries).where(_columns.id == due.id, IS_PENDING, _columns.claim_id == due.claim.claim_id)
            fault = error.as_dict() if error else None
            told: dict[str, Any] = {"sent_bytes": due.claim.done, "total_bytes": due.claim.total, "error": fault}
            if result is not None:
                told |= {"state": "delivered", "result": result, "resume": {}, **_SETTLED}
            elif pause_s is not None:
                told |= {"next_at": db_now(pause_s), "claim_id": null(), "claim_until": null()}
            else:
                told |= {"state": "failed", **_SETTLED}
            if not connection.execute(mine.values(**told)).rowcount:
                return False
            self._log(connection, due, fault, duration_s)
        return True

    def forget(self, older_than_s: float) -> int:
        """Delete settled deliveries that ended more than `older_than_s` seconds ago. Returns their number."""
        old = (_columns.finished_at.is_not(None), _columns.finished_at < db_now(-older_than_s))
        with transaction(self._engine) as connection:
            return connection.execute(delete(deliveries).where(*old)).rowcount

    def _log(self, connection: Connection, due: DueDelivery, fault: dict[str, Any] | None, duration_s: float) -> None:
        count = select(delivery_attempts.c.number).where(delivery_attempts.c.delivery_id == due.id)
        last = connection.scalars(count.order_by(delivery_attempts.c.number.desc()).limit(1)).one_or_none() or 0
        row = {"delivery_id": due.id, "number": last + 1, "error": fault, "sent_bytes": due.claim.sent}
        connection.execute(insert(delivery_attempts).values(at=db_now(), duration_ms=round(duration_s * 1000), **row))

    def _write(self, claim: Claim, **values: Any) -> bool:
        mine = update(deliveries).where(_columns.id == claim.row_id, IS_PENDING, _columns.claim_id == claim.claim_id)
        with transaction(self._engine) as connection:
            return bool(connection.execute(mine.values(**values)).rowcount)


_SETTLED: dict[str, Any] = {"next_at": null(), "claim_id": null(), "claim_until": null(), "finished_at": db_now()}
_NEWER = NightpressError(
    ErrorCode.CANCELLED,
    "A newer result was given to the same address first.",
    hint="Nothing is lost: that one is there.",
).as_dict()


def _views() -> Any:
    running = case((_columns.claim_until >= db_now(), literal_column("1")), else_=literal_column("0"))
    return select(deliveries, running.label("running"))


def _view(row: Row[Any], log: list[DeliveryAttemptView] | None = None) -> ResultDeliveryView:
    return ResultDeliveryView(**{**row._mapping, "running": bool(row.running)}, log=log or [])


def _of_tenant(tenant_id: str, delivery_id: str) -> list[ColumnElement[bool]]:
    return [_columns.tenant_id == tenant_id, _columns.id == delivery_id]
