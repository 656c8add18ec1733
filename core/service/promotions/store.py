"""The latest result of each model name.

The transaction in which a job is accepted promotes its result. A user can promote an earlier result to go back. The history is kept.
"""

from typing import Any, Literal

from sqlalchemy import Engine, Select, exists, func, insert, select, tuple_
from sqlalchemy.engine import Connection

from nightpress.core.database import later_than, lock_until_commit, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.paging import newest_first
from nightpress.core.service.deliveries.outbox import deliver_latest
from nightpress.core.service.tables.jobs import job_artifacts, jobs
from nightpress.core.service.tables.promotions import promotions
from nightpress.core.service.trackers.outbox import note_for_trackers
from nightpress.core.service.webhooks.outbox import note_event
from nightpress.core.wire.promotions import PromotionView

_columns = promotions.c


class PromotionStore:
    """The promotions of all tenants. `model_name` is the name of the model that the job compressed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def latest(self, tenant_id: str, model_name: str) -> PromotionView:
        """The newest promotion of a model name. Raises not_found if no result was ever promoted."""
        query = _select().where(_columns.tenant_id == tenant_id, _columns.model_name == model_name)
        with transaction(self._engine, read_only=True) as connection:
            newest = query.order_by(_columns.created_at.desc(), _columns.id.desc()).limit(1)
            row = connection.execute(newest).one_or_none()
        if row is None:
            raise NightpressError(
                ErrorCode.NOT_FOUND,
                "No accepted result has this model's name yet.",
                hint="A job's result is promoted when it passes its recipe's gates; `promote: false` keeps it from that.",
            )
        return PromotionView(**row._mapping)

    def page(
        self, tenant_id: str, model_name: str, *, cursor: str | None, limit: int
    ) -> tuple[list[PromotionView], str | None]:
        """One page of a name's promotions, newest first, and the cursor of the next. The first of all is the current one."""
        query = _select().where(_columns.tenant_id == tenant_id, _columns.model_name == model_name)
        rows, following = newest_first(
            self._engine, query, _columns.created_at, _columns.id, cursor=cursor, limit=limit
        )
        return [PromotionView(**row._mapping) for row in rows], following

    def promote(self, tenant_id: str, model_name: str, job_id: str, *, key_id: str | None) -> PromotionView:
        """Promote the result of a job, e.g. an earlier one. Raises not_found, conflict (it was not accepted, or was pruned)."""
        mine = (jobs.c.id == job_id, jobs.c.tenant_id == tenant_id, jobs.c.model_name == model_name)
        with transaction(self._engine) as connection:
            query = select(jobs.c.state, jobs.c.verdict, jobs.c.artifacts_state).where(*mine)
            row = connection.execute(query.with_for_update()).one_or_none()  # so that retention does not prune it now
            if row is None:
                raise NightpressError(
                    ErrorCode.NOT_FOUND,
                    "There is no such job of this model.",
                    hint="GET /v1/jobs?model=… lists them.",
                )
            if row.verdict != "accepted":
                raise NightpressError(
                    ErrorCode.CONFLICT,
                    f"The job is {row.verdict or row.state}; only an accepted result can be promoted.",
                    hint="Its report says which gate it missed." if row.verdict else "Wait for its end.",
                )
            has_some = select(exists().where(job_artifacts.c.job_id == job_id))
            if row.artifacts_state != "kept" or not connection.execute(has_some).scalar_one():
                raise NightpressError(
                    ErrorCode.CONFLICT, "The job's artifacts were pruned.", hint="Run it again: `nightpress retry`."
                )
            lock_until_commit(connection, _pointer(tenant_id, model_name))
            written = _write(connection, tenant_id, model_name, job_id, "manual", key_id)
            return PromotionView(**connection.execute(_select().where(_columns.id == written)).one()._mapping)


def promote_accepted(connection: Connection, tenant_id: str, model_name: str, job_id: str) -> None:
    """Promote a job in the transaction in which it is accepted, unless a job that was submitted later has been promoted already."""
    # If two jobs end at the same time, the second must see the row that the first wrote.
    lock_until_commit(connection, _pointer(tenant_id, model_name))
    mine, other = jobs.alias("mine"), jobs.alias("other")
    newer = exists().where(
        _columns.tenant_id == tenant_id,
        _columns.model_name == model_name,
        _columns.cause == "accepted",
        other.c.id == _columns.job_id,
        mine.c.id == job_id,
        tuple_(other.c.created_at, other.c.id) > tuple_(mine.c.created_at, mine.c.id),
    )
    if not connection.execute(select(newer)).scalar_one():
        _write(connection, tenant_id, model_name, job_id, "accepted", None)


def _write(
    connection: Connection,
    tenant_id: str,
    model_name: str,
    job_id: str,
    cause: Literal["accepted", "manual"],
    key_id: str | None,
) -> str:
    """Insert a promotion that is newer than all others of the name, and deliver the result to the name's destinations. Returns its id."""
    there = (_columns.tenant_id == tenant_id, _columns.model_name == model_name)
    created_at = later_than(connection, select(func.max(_columns.created_at)).where(*there))
    row = {"tenant_id": tenant_id, "model_name": model_name, "job_id": job_id, "cause": cause, "created_by": key_id}
    written = new_id("prm")
    connection.execute(insert(promotions).values(id=written, created_at=created_at, **row))
    deliver_latest(connection, tenant_id, model_name, job_id, key_id=key_id)
    note_for_trackers(connection, job_id)
    told = {"id": written, "model_name": model_name, "job_id": job_id, "cause": cause}
    note_event(connection, tenant_id, "model.promoted", told)
    return written


def _pointer(tenant_id: str, model_name: str) -> str:
    return f"promotions/{tenant_id}/{model_name}"


def _select() -> Select[Any]:
    return select(promotions, jobs.c.model_id, jobs.c.recipe["name"].as_string().label("recipe")).join_from(
        promotions, jobs, jobs.c.id == _columns.job_id
    )
