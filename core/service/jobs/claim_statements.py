"""The statements that choose the job for a worker: by priority, then the tenant with the fewest running jobs, then age.

A claim for the oldest job ignores priorities and fairness, but not quotas. So no job waits forever, even if jobs of a higher priority
keep coming. Each statement is built once for each number of kinds of GPUs that a host may have; `kinds`: 0 for the queue `cpu`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    Column,
    ColumnElement,
    Integer,
    ScalarSelect,
    Select,
    String,
    Update,
    and_,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    not_,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.types import BigInteger, Float

from nightpress.core.database import JsonType, UtcDateTime, db_day, db_month, db_now
from nightpress.core.service.costs.prices import MICROS
from nightpress.core.service.jobs.queries import JOB_COLUMNS
from nightpress.core.service.jobs.records import NOT_FOR_OLD_WORKERS, WorkerOffer
from nightpress.core.service.jobs.states import RUNNING
from nightpress.core.service.tables.access import gpu_usage
from nightpress.core.service.tables.access import tenants as tenants_table
from nightpress.core.service.tables.costs import spending
from nightpress.core.service.tables.jobs import IS_LEASED, IS_QUEUED, job_attempts, job_events, jobs

_columns = jobs.c
HELD_BACK_S = 60.0  #: seconds for which a worker holds GPUs back for a job; it renews this while it has some free
_IN_QUEUE = (IS_QUEUED, _columns.queue == bindparam("offered_queue", type_=String))
_AVOIDED_S = 600.0  #: seconds for which a job is not offered again to a worker whose machine failed during it
_failed_it = job_attempts.alias("failed_it")
_WAS_FAILED_HERE = exists().where(
    _failed_it.c.job_id == _columns.id,
    _failed_it.c.worker_id == bindparam("claimed_by", type_=String),
    _failed_it.c.outcome == literal_column("'released'"),
    _failed_it.c.error.is_not(None),
    _failed_it.c.finished_at > db_now(-_AVOIDED_S),
)
_DUE = (
    *_IN_QUEUE,
    _columns.run_after <= db_now(),
    ~_WAS_FAILED_HERE,
)


_HAS_MEMORY = _columns.needs_memory <= bindparam("offered_memory", type_=BigInteger)


def _fits(kinds: int, *, oldest: bool) -> tuple[ColumnElement[bool], ...]:
    """The jobs that the worker can take now. On a host that holds GPUs back for a job, only that job and those before it."""
    free = (*_DUE, _HAS_MEMORY)
    if not kinds:
        return free
    no_younger = _columns.created_at <= bindparam("held_created_at", type_=UtcDateTime())
    held_priority = bindparam("held_priority", type_=Integer)
    before = or_(_columns.priority > held_priority, and_(_columns.priority == held_priority, no_younger))
    return (*free, _on_some_kind(kinds, "free_gpus"), no_younger if oldest else before)


def _on_some_kind(kinds: int, counts: str) -> ColumnElement[bool]:
    """Whether one kind of GPU has the memory and the number that a job needs. counts: the name of the parameters with the numbers."""
    memory = _columns.needs_gpu_memory % literal_column(str(NOT_FOR_OLD_WORKERS))
    return or_(
        *(
            and_(
                memory <= bindparam(f"kind_memory_{kind}", type_=BigInteger),
                _columns.needs_gpus <= bindparam(f"{counts}_{kind}", type_=Integer),
            )
            for kind in range(kinds)
        )
    )


@dataclass(frozen=True)
class Caps:
    """The limits on running jobs of tenants without quotas of their own. 0: no limit."""

    running: int = 0
    gpu_seconds_month: int = 0
    cost_day: int = 0  #: in the operator's currency
    cost_month: int = 0


def claim_values(offer: WorkerOffer, lease_id: str, ttl_s: float, caps: Caps) -> dict[str, Any]:
    """The parameters of the statements below."""
    return {
        "default_running": caps.running,
        "default_gpu_seconds": caps.gpu_seconds_month,
        "default_cost_day": caps.cost_day,
        "default_cost_month": caps.cost_month,
        "offered_queue": offer.queue,
        "offered_memory": offer.memory,
        "claimed_by": offer.worker_id,
        "new_lease": lease_id,
        "ttl_s": ttl_s,
    }


def _waiting_tenants() -> CTE:
    """Tenants with jobs in the queue. Each step finds the next tenant in the claim index; a DISTINCT would read the whole index."""
    tenants = select(func.min(_columns.tenant_id).label("id")).where(*_IN_QUEUE).cte("waiting", recursive=True)
    following = select(func.min(_columns.tenant_id)).where(*_IN_QUEUE, _columns.tenant_id > tenants.c.id)
    return tenants.union_all(select(following.correlate(tenants).scalar_subquery()).where(tenants.c.id.is_not(None)))


def _waiting_levels() -> CTE:
    """Each pair of a tenant and a priority that has jobs in the queue, found in the same way."""
    tenants = _waiting_tenants()
    highest = select(func.max(_columns.priority)).where(*_IN_QUEUE, _columns.tenant_id == tenants.c.id)
    of_each = select(tenants.c.id, highest.correlate(tenants).scalar_subquery().label("priority"))
    levels = of_each.where(tenants.c.id.is_not(None)).cte("levels", recursive=True)
    lower = select(func.max(_columns.priority)).where(
        *_IN_QUEUE, _columns.tenant_id == levels.c.id, _columns.priority < levels.c.priority
    )
    step = select(levels.c.id, lower.correlate(levels).scalar_subquery()).where(levels.c.priority.is_not(None))
    return levels.union_all(step)


@cache
def whose_turn(*, oldest: bool, kinds: int = 0) -> Select[Any]:
    """The tenant whose turn it is, and the priority. Costs a few index lookups per tenant, independent of the number of jobs."""
    tenants = _waiting_levels() if oldest else _waiting_tenants()
    of_them = [_columns.tenant_id == tenants.c.id]
    if oldest:
        of_them.append(_columns.priority == tenants.c.priority)
    candidate = jobs.alias("candidate")
    running = _running_of(tenants)
    by_age = (candidate.c.created_at, candidate.c.id)
    return (
        _best_of_each(tenants, candidate, [*_fits(kinds, oldest=oldest), *of_them])
        .with_only_columns(candidate.c.tenant_id, candidate.c.priority)
        .order_by(*by_age if oldest else (candidate.c.priority.desc(), running, *by_age))
        .limit(literal_column("1"))
    )


@cache
def hold_back(kinds: int) -> Update:
    """Let the worker hold its free GPUs and memory back for the oldest job, of the highest priority, that only the whole host could take.

    Returns the job's priority and time; no row: nothing is held back. Only one worker holds back for a job. It goes on after the job fits,
    so that nothing younger gets in between.
    """
    tenants = _waiting_tenants()
    mine = _columns.held_by == bindparam("claimed_by", type_=String)
    of_nobody_else = or_(_columns.held_until.is_(None), _columns.held_until < db_now(), mine)
    fits_now = and_(_HAS_MEMORY, _on_some_kind(kinds, "free_gpus"))
    conditions = [
        *_DUE,
        _columns.needs_memory <= bindparam("host_memory", type_=BigInteger),
        _on_some_kind(kinds, "host_gpus"),
        or_(not_(fits_now), mine),
        of_nobody_else,
    ]
    candidate = jobs.alias("candidate")
    first = (
        _best_of_each(tenants, candidate, [*conditions, _columns.tenant_id == tenants.c.id])
        .with_only_columns(candidate.c.id)
        .order_by(candidate.c.priority.desc(), candidate.c.created_at, candidate.c.id)
        .limit(literal_column("1"))
        .scalar_subquery()
    )
    return (
        update(jobs)
        .where(IS_QUEUED, _columns.id == first, of_nobody_else)
        .values(held_by=bindparam("claimed_by", type_=String), held_until=db_now(HELD_BACK_S))
        .returning(_columns.priority, _columns.created_at)
    )


def _best_of_each(tenants: CTE, candidate: Any, conditions: list[ColumnElement[bool]]) -> Select[Any]:
    """Each tenant's best job that meets the conditions, as `candidate`, of the tenants that are within their quotas."""
    best_of = (
        select(_columns.id)
        .where(*conditions)
        .order_by(_columns.priority.desc(), _columns.created_at, _columns.id)
        .limit(literal_column("1"))
        .correlate(tenants)
        .scalar_subquery()
    )
    running = _running_of(tenants)
    most_running = _cap(tenants_table.c.max_running_jobs, "default_running", tenants)
    most_gpu = _cap(tenants_table.c.max_gpu_seconds_month, "default_gpu_seconds", tenants)
    used = (
        select(gpu_usage.c.seconds)
        .where(gpu_usage.c.tenant_id == tenants.c.id, gpu_usage.c.month == db_month())
        .correlate(tenants)
        .scalar_subquery()
    )
    return (
        select(candidate.c.id)
        .join_from(tenants, candidate, candidate.c.id == best_of)
        .where(
            or_(most_running == literal_column("0"), running < most_running),
            or_(
                candidate.c.queue != literal_column("'gpu'"),
                most_gpu == literal_column("0"),
                func.coalesce(used, literal_column("0")) < most_gpu,
            ),
            _within_budget(tenants_table.c.max_cost_day, "default_cost_day", tenants, since=db_day()),
            _within_budget(tenants_table.c.max_cost_month, "default_cost_month", tenants, since=db_month()),
        )
    )


def _running_of(tenants: CTE) -> ScalarSelect[Any]:
    """The number of a tenant's running jobs."""
    return (
        select(func.count())
        .select_from(jobs)
        .where(IS_LEASED, _columns.tenant_id == tenants.c.id)
        .correlate(tenants)
        .scalar_subquery()
    )


def _cap(column: Column[Any], default: str, tenants: CTE) -> ColumnElement[Any]:
    """A tenant's own limit, or the default if it has none."""
    own = select(column).where(tenants_table.c.id == tenants.c.id).correlate(tenants).scalar_subquery()
    return func.coalesce(own, bindparam(default, type_=BigInteger))


def _within_budget(column: Column[Any], default: str, tenants: CTE, *, since: db_day | db_month) -> ColumnElement[bool]:
    """Whether a tenant has money left: of the attempts that were counted since the day or month began."""
    most = _cap(column, default, tenants)
    mine = (spending.c.tenant_id == tenants.c.id, spending.c.day >= since)
    spent = select(func.sum(spending.c.micros)).where(*mine).correlate(tenants).scalar_subquery()
    zero = literal_column("0", BigInteger)
    return or_(most == zero, func.coalesce(spent, zero) < most * literal_column(str(MICROS)))


def some_have_caps() -> Select[Any]:
    """Whether any tenant has its own quota of running jobs."""
    return select(exists().where(tenants_table.c.max_running_jobs > 0))


def _best_job(*, oldest: bool, kinds: int) -> ScalarSelect[Any]:
    """The tenant's oldest job of that priority whose row no other worker has locked."""
    turn = whose_turn(oldest=oldest, kinds=kinds).scalar_subquery()
    return (
        select(_columns.id)
        .where(*_fits(kinds, oldest=oldest), tuple_(_columns.tenant_id, _columns.priority) == turn)
        .order_by(_columns.created_at, _columns.id)
        .limit(literal_column("1"))
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


@cache
def claim_job(*, oldest: bool, kinds: int = 0) -> Update:
    """queued → running, in one UPDATE. Returns the job and the number of the event."""
    values: dict[str, Any] = {
        "state": literal_column(f"'{RUNNING}'"),
        "attempt": _columns.attempt + literal_column("1"),
        "event_seq": _columns.event_seq + literal_column("1"),
        "worker_id": bindparam("claimed_by", type_=String),
        "lease_id": bindparam("new_lease", type_=String),
        "lease_expires_at": db_now(bindparam("ttl_s", type_=Float)),
        "started_at": db_now(),
        "progressed_at": db_now(),
        "start_before": null(),
        "held_by": null(),
        "held_until": null(),
        "phase": literal_column("'fetching'"),
        "progress": literal_column("0"),
        "pass_index": null(),
        "eta_s": null(),
        "message": literal_column("''"),
    }
    guarded = update(jobs).where(IS_QUEUED, _columns.id == _best_job(oldest=oldest, kinds=kinds)).values(values)
    return guarded.returning(*JOB_COLUMNS, _columns.event_seq)


@cache
def claim_and_note(*, oldest: bool) -> Select[Any]:
    """For PostgreSQL: the same UPDATE, with the inserts of the attempt and the event, in one statement and one round trip."""
    claimed = claim_job(oldest=oldest).cte("claimed")
    attempt = select(claimed.c.id, claimed.c.attempt, claimed.c.lease_id, claimed.c.worker_id, claimed.c.started_at)
    opened = insert(job_attempts).from_select(["job_id", "number", "lease_id", "worker_id", "started_at"], attempt)
    data: ColumnElement[Any] = func.jsonb_build_object(
        literal_column("'attempt'"),
        claimed.c.attempt,
        literal_column("'worker_id'"),
        claimed.c.worker_id,
        type_=JsonType,
    )
    event = select(claimed.c.id, claimed.c.event_seq, claimed.c.started_at, literal_column("'started'"), data)
    noted = insert(job_events).from_select(["job_id", "seq", "at", "kind", "data"], event)
    return (
        select(*(claimed.c[column.name] for column in JOB_COLUMNS), claimed.c.event_seq)
        .add_cte(opened.cte("opened"))
        .add_cte(noted.cte("noted"))
    )
