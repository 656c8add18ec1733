"""What was spent. The cost of an attempt is written once, after its end, together with its tenant's sum of the day.

The control process does this, and not the worker: a worker needs no prices. The guarded update of `cost_micros` lets one replica count
each attempt. Until then, and while the attempt runs, its cost is computed when it is read. A later change of prices changes nothing that was written.
"""

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Boolean, ColumnElement, Engine, Row, Select, func, literal_column, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from nightpress.core.database import UtcDateTime, db_now, read_now, transaction
from nightpress.core.service.costs.prices import MICROS, PriceList
from nightpress.core.service.tables.costs import spending
from nightpress.core.service.tables.jobs import IS_LEASED, job_attempts, jobs, workers
from nightpress.core.service.tables.schedules import schedule_runs
from nightpress.core.service.tables.studies import studies
from nightpress.core.wire.costs import DayView

_BATCH = 500
_attempts = job_attempts.c
#: As text, so that the partial index is used.
_NOT_COUNTED: ColumnElement[bool] = literal_column("job_attempts.cost_micros IS NULL", Boolean())
_ENDS = func.coalesce(_attempts.finished_at, db_now(), type_=UtcDateTime)


class Spent(NamedTuple):
    """What a tenant has spent, in millionths of the currency; attempts that run are included."""

    day: int
    month: int


@dataclass(frozen=True)
class AttemptCost:
    """An attempt of a job. `device`: the name of its GPUs, if it or its worker is still known. `gpus`: their number."""

    number: int
    worker_id: str
    device: str | None
    gpus: int
    seconds: float
    micros: int
    ended: bool


class CostLedger:
    """Safe to share between threads, and to run in several processes."""

    def __init__(self, engine: Engine, prices: PriceList) -> None:
        self.prices = prices
        self._engine = engine
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert

    # The control process -----------------------------------------------------------------------------------------

    def count_ended(self) -> int:
        """Write the cost of attempts that have ended. Returns how many were counted by this call; 0: none is left."""
        if not self.prices:
            return 0
        ended = _priced().where(_NOT_COUNTED, _attempts.finished_at.is_not(None))
        with transaction(self._engine) as connection:
            rows = connection.execute(ended.order_by(_attempts.job_id, _attempts.number).limit(_BATCH)).all()
            sums: Counter[tuple[str, str]] = Counter()
            counted = 0
            for row in rows:
                micros = self._micros(row)
                this = (_attempts.job_id == row.job_id, _attempts.number == row.number, _NOT_COUNTED)
                if connection.execute(update(job_attempts).where(*this).values(cost_micros=micros)).rowcount:
                    counted += 1
                    sums[row.tenant_id, _day(row.ends)] += micros
            for (tenant_id, day), micros in sorted(sums.items()):
                new = self._insert(spending).values(tenant_id=tenant_id, day=day, micros=micros)
                more = {"micros": spending.c.micros + new.excluded.micros}
                connection.execute(new.on_conflict_do_update(index_elements=["tenant_id", "day"], set_=more))
        return counted

    # For reads ---------------------------------------------------------------------------------------------------

    def spent(self, tenant_id: str) -> Spent:
        """What a tenant has spent today and this month, in UTC by the database's clock."""
        if not self.prices:
            return Spent(0, 0)
        with transaction(self._engine, read_only=True) as connection:
            today = _day(read_now(connection))
            mine = select(spending.c.day, spending.c.micros).where(
                spending.c.tenant_id == tenant_id, spending.c.day >= today[:7]
            )
            days = {row.day: row.micros for row in connection.execute(mine)}
            open_cost = sum(map(self._micros, connection.execute(_open_of(tenant_id))))
        return Spent(days.get(today, 0) + open_cost, sum(days.values()) + open_cost)

    def by_day(self, tenant_id: str, days: int) -> list[DayView]:
        """What a tenant's attempts that have ended cost on each of the last days, newest first."""
        query = select(spending.c.day, spending.c.micros).where(spending.c.tenant_id == tenant_id)
        with transaction(self._engine, read_only=True) as connection:
            since = _day(read_now(connection) - dt.timedelta(days=days - 1))
            query = query.where(spending.c.day >= since).order_by(spending.c.day.desc())
            return [DayView(day=row.day, amount=row.micros / MICROS) for row in connection.execute(query)]

    def spent_by_all(self) -> Spent:
        """What all tenants have spent today and this month, attempts that have been counted."""
        if not self.prices:
            return Spent(0, 0)
        sums = select(spending.c.day, func.sum(spending.c.micros)).group_by(spending.c.day)
        with transaction(self._engine, read_only=True) as connection:
            today = _day(read_now(connection))
            days = {day: int(micros) for day, micros in connection.execute(sums.where(spending.c.day >= today[:7]))}
        return Spent(days.get(today, 0), sum(days.values()))

    def of_jobs(self, job_ids: Sequence[str]) -> dict[str, float] | None:
        """Job → what all its attempts cost until now, in the currency. None without prices."""
        if not self.prices:
            return None
        with transaction(self._engine, read_only=True) as connection:
            return {job: micros / MICROS for job, micros in costs_of(connection, self.prices, job_ids).items()}

    def attempts(self, job_id: str) -> list[AttemptCost]:
        """The attempts of a job, in order."""
        query = _priced().where(_attempts.job_id == job_id).order_by(_attempts.number)
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query).all()
        return [
            AttemptCost(
                row.number,
                row.worker_id,
                _device(row),
                _gpus(row),
                _seconds(row),
                self._micros(row),
                row.finished_at is not None,
            )
            for row in rows
        ]

    def of_schedules(self, schedule_ids: Sequence[str]) -> dict[str, float] | None:
        """Schedule → what the jobs and studies of its runs cost, in the currency, as far as these are kept. None without prices."""
        if not self.prices:
            return None
        runs = schedule_runs.c
        single = select(runs.schedule_id, runs.job_id).where(
            runs.schedule_id.in_(schedule_ids), runs.job_id.is_not(None)
        )
        whole = (
            select(runs.schedule_id, func.sum(studies.c.cost_micros))
            .join_from(schedule_runs, studies, studies.c.id == runs.study_id)
            .where(runs.schedule_id.in_(schedule_ids))
            .group_by(runs.schedule_id)
        )
        with transaction(self._engine, read_only=True) as connection:
            found: Counter[str] = Counter({name: int(micros) for name, micros in connection.execute(whole)})
            by_job = {row.job_id: row.schedule_id for row in connection.execute(single)}
            for job_id, micros in costs_of(connection, self.prices, list(by_job)).items():
                found[by_job[job_id]] += micros
        return {name: found[name] / MICROS for name in schedule_ids}

    def _micros(self, row: Row[Any]) -> int:
        return _micros(self.prices, row)


def costs_of(connection: Connection, prices: PriceList, job_ids: Sequence[str]) -> dict[str, int]:
    """Job → what all its attempts cost until now, in millionths of the currency."""
    found: Counter[str] = Counter(dict.fromkeys(job_ids, 0))
    for some in _batches(job_ids):
        for row in connection.execute(_priced().where(_attempts.job_id.in_(some))):
            found[row.job_id] += _micros(prices, row)
    return dict(found)


def _priced() -> Select[Any]:
    """Attempts with all that decides their cost."""
    return (
        select(
            _attempts.job_id,
            _attempts.number,
            _attempts.worker_id,
            _attempts.started_at,
            _attempts.finished_at,
            _attempts.cost_micros,
            _attempts.gpus,
            _ENDS.label("ends"),
            jobs.c.tenant_id,
            jobs.c.queue,
            jobs.c.needs_gpus,
            workers.c.device,
        )
        .join_from(job_attempts, jobs, jobs.c.id == _attempts.job_id)
        .join(workers, workers.c.id == _attempts.worker_id, isouter=True)
    )


def _open_of(tenant_id: str) -> Select[Any]:
    """The tenant's attempts that run, or have ended and are not counted yet."""
    return _priced().where(
        jobs.c.tenant_id == tenant_id, _NOT_COUNTED, or_(IS_LEASED, _attempts.finished_at.is_not(None))
    )


def _micros(prices: PriceList, row: Row[Any]) -> int:
    """What was written, or else what the attempt costs until now."""
    if row.cost_micros is not None:
        return int(row.cost_micros)
    return prices.micros(row.queue, _device(row), _seconds(row) * max(1, _gpus(row)))


def _gpus(row: Row[Any]) -> int:
    return int(row.needs_gpus) if row.queue == "gpu" else 0


def _device(row: Row[Any]) -> str | None:
    """The name of the attempt's GPUs; of an attempt that did not write it down, what its worker says."""
    return str(row.gpus[0]["name"]) if row.gpus else row.device


def _seconds(row: Row[Any]) -> float:
    return max(0.0, float((row.ends - row.started_at).total_seconds()))


def _day(moment: dt.datetime) -> str:
    return f"{moment.astimezone(dt.UTC):%Y-%m-%d}"


def _batches(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[at : at + _BATCH] for at in range(0, len(ids), _BATCH))
