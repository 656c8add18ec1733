"""Studies for users: create, list, read, cancel. core/service/studies/ledger.py has the writes of the control process."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, Row, func, insert, select
from sqlalchemy.exc import IntegrityError

from nightpress.core.database import db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.numbers import whole_number
from nightpress.core.paging import newest_first
from nightpress.core.recipes.search.space import Space
from nightpress.core.service.costs.prices import MICROS, UNPRICED, PriceList
from nightpress.core.service.jobs.positions import Position
from nightpress.core.service.jobs.records import Event
from nightpress.core.service.studies.ledger import request_cancel
from nightpress.core.service.tables.studies import studies, study_events, study_trials
from nightpress.core.service.trackers.outbox import note_for_trackers
from nightpress.core.wire.costs import CostView
from nightpress.core.wire.studies import Best, StudyReport, StudyView, TrialView

_MAX_ACTIVE = 100  #: studies of a tenant that have not ended
_HOUR_S = 3600.0
_SHOWN = ("passes", "exports", "calibration")
_trials = study_trials.c


class StudyStore:
    """Studies of all tenants. Every method that takes a tenant sees only that tenant's studies."""

    def __init__(self, engine: Engine, prices: PriceList = UNPRICED) -> None:
        self._engine = engine
        self._prices = prices

    def create(
        self, tenant_id: str, values: Mapping[str, Any], *, hours: float, study_id: str | None = None
    ) -> StudyView:
        """Insert a study. `values`: columns of the row. Returns the study with this id, if there is one. Raises quota_exceeded."""
        new = study_id or new_id("std")
        try:
            self._insert(tenant_id, new, values, hours)
        except IntegrityError:
            if study_id is None:
                raise
        return self.get(tenant_id, new)

    def _insert(self, tenant_id: str, study_id: str, values: Mapping[str, Any], hours: float) -> None:
        mine = (studies.c.tenant_id == tenant_id, studies.c.finished_at.is_(None))
        with transaction(self._engine) as connection:
            if connection.execute(select(func.count()).select_from(studies).where(*mine)).scalar_one() >= _MAX_ACTIVE:
                raise NightpressError(
                    ErrorCode.QUOTA_EXCEEDED,
                    f"There are already {_MAX_ACTIVE} studies that have not ended.",
                    hint="Wait for some to end, or cancel some.",
                )
            row = {
                "id": study_id,
                "tenant_id": tenant_id,
                "state": "searching",
                "event_seq": 1,
                "created_at": db_now(),
                "deadline_at": db_now(hours * _HOUR_S),
            }
            connection.execute(insert(studies).values(**row, **values))
            event = {"study_id": study_id, "seq": 1, "at": db_now(), "kind": "created", "data": {}}
            connection.execute(insert(study_events).values(**event))
            note_for_trackers(connection, study_id)

    def get(self, tenant_id: str, study_id: str) -> StudyView:
        """Raises not_found."""
        query = select(studies).where(studies.c.tenant_id == tenant_id, studies.c.id == study_id)
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise missing_study()
        return self._views([row])[0]

    def page(self, tenant_id: str, *, cursor: str | None, limit: int) -> tuple[list[StudyView], str | None]:
        mine = select(studies).where(studies.c.tenant_id == tenant_id)
        rows, following = newest_first(
            self._engine, mine, studies.c.created_at, studies.c.id, cursor=cursor, limit=limit
        )
        return self._views(rows), following

    def report(self, tenant_id: str, study_id: str) -> StudyReport:
        """Raises not_found, also while the study has no report yet."""
        query = select(studies.c.report).where(studies.c.tenant_id == tenant_id, studies.c.id == study_id)
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise missing_study()
        if row.report is None:
            raise NightpressError(
                ErrorCode.NOT_FOUND, "The study has no report.", hint="It has one when it has succeeded."
            )
        return StudyReport.model_validate(row.report)

    def trials(
        self, tenant_id: str, study_id: str, *, cursor: str | None, limit: int
    ) -> tuple[list[TrialView], str | None]:
        """One page of the study's trials, in the order of their numbers, and the cursor of the next."""
        after = -1 if cursor is None else whole_number(cursor)
        if after is None:
            raise NightpressError(
                ErrorCode.INVALID_REQUEST,
                "The cursor is not one that this service gave out.",
                hint="Start again without a cursor.",
            )
        owned = select(studies.c.space).where(studies.c.tenant_id == tenant_id, studies.c.id == study_id)
        query = select(study_trials).where(_trials.study_id == study_id, _trials.number > after)
        with transaction(self._engine, read_only=True) as connection:
            study = connection.execute(owned).one_or_none()
            if study is None:
                raise missing_study()
            rows = connection.execute(query.order_by(_trials.number).limit(limit + 1)).all()
        space = Space(study.space["recipes"])
        views = [_trial_view(row, space) for row in rows[:limit]]
        return views, str(views[-1].number) if len(rows) > limit else None

    def events(self, study_id: str, *, after: int = 0, limit: int = 500) -> list[Event]:
        """The events with numbers above `after`, in order."""
        columns = study_events.c
        query = select(columns.seq, columns.at, columns.kind, columns.data)
        query = query.where(columns.study_id == study_id, columns.seq > after).order_by(columns.seq).limit(limit)
        with transaction(self._engine, read_only=True) as connection:
            return [Event(*row) for row in connection.execute(query)]

    def request_cancel(self, tenant_id: str, study_id: str) -> list[str]:
        """searching | judging → cancelling; any other state stays. Returns the jobs to cancel. Raises not_found."""
        self.get(tenant_id, study_id)
        opened = select(_trials.job_id).where(
            _trials.study_id == study_id, _trials.state == "open", _trials.job_id.is_not(None)
        )
        with transaction(self._engine) as connection:
            if not request_cancel(connection, tenant_id, study_id):
                return []
            return list(connection.execute(opened).scalars())

    def _views(self, rows: Sequence[Row[Any]]) -> list[StudyView]:
        ids = [row.id for row in rows]
        mine = (_trials.study_id.in_(ids), _trials.role == "search")
        counted = (
            select(_trials.study_id, _trials.state, func.count()).where(*mine).group_by(_trials.study_id, _trials.state)
        )
        order = func.row_number().over(partition_by=_trials.study_id, order_by=(_trials.goal, _trials.number))
        kept = (
            select(_trials.study_id, _trials.number, _trials.job_id, _trials.goal, order.label("place"))
            .where(*mine, _trials.state == "kept")
            .subquery()
        )
        winners = select(_trials.study_id, _trials.job_id).join_from(
            study_trials, studies, (studies.c.id == _trials.study_id) & (studies.c.winner == _trials.number)
        )
        with transaction(self._engine, read_only=True) as connection:
            counts: dict[str, dict[str, int]] = {study_id: {} for study_id in ids}
            for study_id, state, count in connection.execute(counted):
                counts[study_id][state] = count
            best = {
                row.study_id: Best(number=row.number, job_id=row.job_id, goal=row.goal)
                for row in connection.execute(select(kept).where(kept.c.place == 1))
            }
            won = {row.study_id: row.job_id for row in connection.execute(winners.where(studies.c.id.in_(ids)))}
        return [_view(row, counts[row.id], best.get(row.id), won.get(row.id), self._cost(row)) for row in rows]

    def _cost(self, row: Row[Any]) -> CostView | None:
        return CostView(amount=row.cost_micros / MICROS, currency=self._prices.currency) if self._prices else None


def read_positions(engine: Engine, study_ids: Sequence[str]) -> dict[str, Position]:
    """The positions of the studies that exist, for event streams. A study has no log of its own."""
    wanted = select(studies.c.id, studies.c.state, studies.c.event_seq).where(studies.c.id.in_(study_ids))
    with transaction(engine, read_only=True) as connection:
        return {row.id: Position(row.state, row.event_seq, 0) for row in connection.execute(wanted)}


def _view(
    row: Row[Any], counts: dict[str, int], best: Best | None, winner: str | None, cost: CostView | None
) -> StudyView:
    given = dict(row._mapping)
    return StudyView(
        **{
            **given,
            "space": given["space"]["recipes"],
            "trials": row.max_trials,
            "judge": row.max_judged,
            "cpu_hours": None if row.cpu_limit_s is None else row.cpu_limit_s / _HOUR_S,
            "gpu_hours": None if row.gpu_limit_s is None else row.gpu_limit_s / _HOUR_S,
            "cpu_seconds": row.cpu_s,
            "gpu_seconds": row.gpu_s,
            "counts": counts,
            "best": best,
            "max_cost": row.cost_limit,
            "cost": cost,
            "winner_job_id": winner,
        }
    )


def _trial_view(row: Row[Any], space: Space) -> TrialView:
    given = dict(row._mapping)
    return TrialView(
        **{
            **given,
            "choices": space.says(row.params),
            "recipe": {key: row.recipe[key] for key in _SHOWN if key in row.recipe},
            "gates": row.gates or [],
            "cpu_seconds": row.cpu_s,
            "gpu_seconds": row.gpu_s,
        }
    )


def missing_study() -> NightpressError:
    return NightpressError(
        ErrorCode.NOT_FOUND,
        "There is no such study.",
        hint="GET /v1/studies lists yours; `nightpress studies` does too.",
    )
