"""Quotas: what a tenant may use, and what it uses. 0 means no limit.

Usage is read from SQL. If the database does not answer, the request is refused.
"""

import datetime as dt
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sqlalchemy import Engine, func, insert, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from nightpress.core.database import db_month, db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.paging import newest_first
from nightpress.core.service.costs.ledger import CostLedger
from nightpress.core.service.costs.prices import MICROS, PriceList
from nightpress.core.service.tables.access import api_keys, gpu_usage, tenants
from nightpress.core.service.tables.jobs import IS_LEASED, IS_QUEUED, job_artifacts, jobs
from nightpress.core.service.tables.registry import data_sets, models
from nightpress.core.settings import Settings
from nightpress.core.versions import changed_since
from nightpress.core.wire.access import QuotaChange, TenantView, UsageView

NO_BOUND = 2**31 - 1
_CACHE_S = 3.0
_CACHE_SIZE = 10_000


@dataclass(frozen=True)
class Quotas:
    """The limits of a tenant: its own, or those of the settings. Each field is a setting and a column of the same name."""

    max_queued_jobs: int
    max_running_jobs: int
    max_storage_bytes: int
    max_gpu_seconds_month: int
    rate_limit_per_minute: int
    max_cost_day: int
    max_cost_month: int

    @classmethod
    def default(cls, settings: Settings) -> "Quotas":
        return cls(*(getattr(settings, field.name) for field in fields(cls)))


_NAMES = [field.name for field in fields(Quotas)]


class QuotaBook:
    """Reads, checks and changes quotas. A tenant's quotas are cached for three seconds. Safe to share between threads."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._default = Quotas.default(settings)
        self._costs = CostLedger(engine, PriceList.of(settings))
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Quotas, float]] = {}

    def cached(self, tenant_id: str) -> Quotas | None:
        found = self._known.get(tenant_id)
        return found[0] if found is not None and time.monotonic() < found[1] else None

    def of(self, tenant_id: str) -> Quotas:
        known = self.cached(tenant_id)
        if known is not None:
            return known
        query = select(*(tenants.c[name] for name in _NAMES)).where(tenants.c.id == tenant_id)
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        found = self._merged(row._asdict() if row else {})
        with self._lock:
            if len(self._known) >= _CACHE_SIZE:
                self._known.clear()
            self._known[tenant_id] = (found, time.monotonic() + _CACHE_S)
        return found

    def check_storage(self, tenant_id: str, more: int = 0) -> None:
        """Raise quota_exceeded if the stored bytes plus `more` would exceed the tenant's limit, or if the limit is already reached."""
        bound = self.of(tenant_id).max_storage_bytes
        if not bound:
            return
        with transaction(self._engine, read_only=True) as connection:
            stored = _stored(connection, tenant_id)
        if stored + more > bound or (not more and stored >= bound):
            raise NightpressError(
                ErrorCode.QUOTA_EXCEEDED,
                f"{stored / 1e9:.2f} GB of {bound / 1e9:.2f} GB are used.",
                hint="Delete models, data sets or jobs that are not needed any more, or ask for a larger quota.",
                limit=bound,
                used=stored,
            )

    def check_gpu(self, tenant_id: str) -> None:
        """Raise quota_exceeded if the GPU time of this month is used up."""
        bound = self.of(tenant_id).max_gpu_seconds_month
        if not bound:
            return
        with transaction(self._engine, read_only=True) as connection:
            used = _gpu_seconds(connection, tenant_id)
        if used >= bound:
            raise NightpressError(
                ErrorCode.QUOTA_EXCEEDED,
                f"This month's {bound / 3600:.1f} GPU hours are used up.",
                hint="Wait for the first of the month, use a recipe for the CPU, or ask for a larger quota.",
                limit=bound,
                used=round(used),
            )

    def check_budget(self, tenant_id: str) -> None:
        """Raise quota_exceeded if the tenant's money of the day or of the month is spent."""
        quotas = self.of(tenant_id)
        if not (quotas.max_cost_day or quotas.max_cost_month) or not self._costs.prices:
            return
        spent = self._costs.spent(tenant_id)
        for used, bound, period, until in (
            (spent.day, quotas.max_cost_day, "today", "tomorrow (UTC)"),
            (spent.month, quotas.max_cost_month, "this month", "the first of the month (UTC)"),
        ):
            if bound and used >= bound * MICROS:
                raise NightpressError(
                    ErrorCode.QUOTA_EXCEEDED,
                    f"The budget of {bound:,} {self._costs.prices.currency} for {period} is spent: {used / MICROS:,.2f}.",
                    hint=f"Wait until {until}, or ask an administrator for a larger budget.",
                    limit=bound,
                    used=used / MICROS,
                )

    # Administrators ----------------------------------------------------------------------------------------------

    def page(self, *, cursor: str | None, limit: int) -> tuple[list[TenantView], str | None]:
        """One page of the tenants that have a key or their own quotas, by name in descending order, and the cursor of the next."""
        named = select(tenants.c.id).union(select(api_keys.c.tenant_id)).subquery()
        rows, following = newest_first(self._engine, select(named.c.id), named.c.id, cursor=cursor, limit=limit)
        return [self.view(row.id) for row in rows], following

    def view(self, tenant_id: str) -> TenantView:
        """A tenant's quotas and usage. Raises not_found for a tenant that has neither a key nor its own quotas."""
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(select(tenants).where(tenants.c.id == tenant_id)).mappings().one_or_none()
            has_key = select(1).where(api_keys.c.tenant_id == tenant_id).limit(1)
            if row is None and connection.execute(has_key).one_or_none() is None:
                raise NightpressError(
                    ErrorCode.NOT_FOUND, "There is no such tenant.", hint="GET /v1/admin/tenants lists them."
                )
            usage = self._usage(connection, tenant_id)
        own = {name: row[name] if row else None for name in _NAMES}
        return TenantView(
            id=tenant_id,
            own=QuotaChange(**own),
            quotas=asdict(self._merged(dict(row) if row else {})),
            usage=usage,
            version=row["version"] if row else 0,
        )

    def change(self, tenant_id: str, wanted: QuotaChange, *, version: int | None = None) -> TenantView:
        """Set the limits that are given; null resets a limit to the setting. Raises precondition_failed if `version` is outdated."""
        values = wanted.model_dump(exclude_unset=True)
        mine = tenants.c.id == tenant_id
        try:
            with transaction(self._engine) as connection:
                row = connection.execute(select(tenants.c.version).where(mine)).one_or_none()
                there = row.version if row else 0
                if version is not None and version != there:
                    raise changed_since()
                if row is None:
                    new = {"id": tenant_id, "version": 1, "created_at": db_now()}
                    connection.execute(insert(tenants).values(**new, **values))
                else:
                    still = (mine, tenants.c.version == there)
                    won = connection.execute(update(tenants).where(*still).values(version=there + 1, **values))
                    if not won.rowcount:
                        raise changed_since()
        except IntegrityError as error:
            raise changed_since() from error
        with self._lock:
            self._known.pop(tenant_id, None)
        return self.view(tenant_id)

    def usage(self, tenant_id: str) -> UsageView:
        with transaction(self._engine, read_only=True) as connection:
            return self._usage(connection, tenant_id)

    def _usage(self, connection: Connection, tenant_id: str) -> UsageView:
        def count(condition: Any) -> int:
            query = select(func.count()).select_from(jobs).where(condition, jobs.c.tenant_id == tenant_id)
            return int(connection.execute(query).scalar_one())

        spent = self._costs.spent(tenant_id)
        return UsageView(
            queued_jobs=count(IS_QUEUED),
            running_jobs=count(IS_LEASED),
            running_gpus=_running_gpus(connection, tenant_id),
            storage_bytes=_stored(connection, tenant_id),
            gpu_seconds_month=_gpu_seconds(connection, tenant_id),
            cost_day=spent.day / MICROS,
            cost_month=spent.month / MICROS,
            currency=self._costs.prices.currency if self._costs.prices else "",
        )

    def _merged(self, own: Mapping[str, Any]) -> Quotas:
        """The settings' quotas, overridden by the tenant's own."""
        return replace(self._default, **{name: own[name] for name in _NAMES if own.get(name) is not None})


def add_gpu_time(connection: Connection, tenant_id: str, started_at: dt.datetime | None, gpus: int) -> None:
    """Add the time since `started_at`, of each of its GPUs, to the tenant's GPU time of this month, in the transaction that ends the attempt."""
    if started_at is None:
        return
    mine = (gpu_usage.c.tenant_id == tenant_id, gpu_usage.c.month == db_month())
    month, now = connection.execute(select(db_month(), db_now())).one()
    seconds = gpus * max(0.0, (now - started_at).total_seconds())
    more = update(gpu_usage).where(*mine).values(seconds=gpu_usage.c.seconds + seconds)
    if connection.execute(more).rowcount:
        return
    first = insert(gpu_usage).values(tenant_id=tenant_id, month=month, seconds=seconds)
    try:
        with connection.begin_nested():
            connection.execute(first)
    except IntegrityError:  # another attempt of the tenant has inserted the row at the same time
        connection.execute(more)


def _gpu_seconds(connection: Connection, tenant_id: str) -> float:
    query = select(gpu_usage.c.seconds).where(gpu_usage.c.tenant_id == tenant_id, gpu_usage.c.month == db_month())
    return float(connection.execute(query).scalar_one_or_none() or 0.0)


def _running_gpus(connection: Connection, tenant_id: str) -> int:
    held = (IS_LEASED, jobs.c.tenant_id == tenant_id, jobs.c.queue == "gpu")
    return int(connection.execute(select(func.coalesce(func.sum(jobs.c.needs_gpus), 0)).where(*held)).scalar_one())


def _stored(connection: Connection, tenant_id: str) -> int:
    total = 0
    for table in (models, data_sets):
        mine = (table.c.tenant_id == tenant_id, table.c.deleted_at.is_(None), table.c.source != "path")
        kept = (*mine, table.c.state != "failed")
        total += int(connection.execute(select(func.coalesce(func.sum(table.c.size), 0)).where(*kept)).scalar_one())
    made = (
        select(func.coalesce(func.sum(job_artifacts.c.size), 0))
        .join_from(job_artifacts, jobs, jobs.c.id == job_artifacts.c.job_id)
        .where(jobs.c.tenant_id == tenant_id, jobs.c.reused_from.is_(None))  # reused files belong to another job
    )
    return total + int(connection.execute(made).scalar_one())
