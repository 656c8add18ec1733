"""The outbox of trackers: a row for each job and study, with how much of it the tracker knows."""

import datetime as dt
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from nightpress.core.database import clean_text, db_now, read_now, transaction
from nightpress.core.service.tables.trackers import tracked_runs, trackers
from nightpress.core.wire.trackers import TrackedView

CLAIM_S = 120.0  #: seconds after which a row is told again if the process that took it did not settle it
_LONGEST_PAUSE_S = 900.0
_runs = tracked_runs.c


@dataclass(frozen=True, slots=True)
class DueRun:
    """A row that this process has taken. No other process tells it at the same time."""

    tracker: str
    subject: str
    changed: int
    lines: int
    run_id: str | None
    attempts: int  #: including this one
    until: dt.datetime  #: when another process may take it


class TrackerStore:
    """Which trackers there are, and what each of them was told."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def use(self, wanted: dict[str, str]) -> None:
        """Make these the trackers that changes are noted for, and forget the others. wanted: name → address."""
        with transaction(self._engine) as connection:
            connection.execute(delete(trackers).where(trackers.c.name.not_in(sorted(wanted))))
            build = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
            for name, url in wanted.items():
                row = build(trackers).values(name=name, url=url, since=db_now())
                connection.execute(row.on_conflict_do_update(index_elements=["name"], set_={"url": url}))

    def take_due(self, tracker: str, *, limit: int) -> list[DueRun]:
        """Take the rows that are due, by moving their next attempt."""
        with transaction(self._engine, read_only=True) as connection:
            now = read_now(connection)
            due = (_runs.tracker == tracker, _runs.next_at <= now)
            query = select(tracked_runs).where(*due).order_by(_runs.next_at).limit(limit)
            rows = connection.execute(query).all()
        taken = []
        for row in rows:
            until = now + dt.timedelta(seconds=CLAIM_S)
            still = (_runs.attempts == row.attempts, _runs.next_at == row.next_at)
            claimed = update(tracked_runs).where(*_row(tracker, row.subject), *still)
            values = {"attempts": row.attempts + 1, "next_at": until}
            with transaction(self._engine) as connection:
                won = connection.execute(claimed.values(**values).returning(_runs.changed)).scalar_one_or_none()
            if won is not None:
                taken.append(DueRun(tracker, row.subject, won, row.lines, row.run_id, row.attempts + 1, until))
        return taken

    def begun(self, due: DueRun, run_id: str, page: str) -> bool:
        """Keep the tracker's id of the run and its page. False: the row was taken by another process."""
        named = update(tracked_runs).where(*_held(due)).values(run_id=run_id, page=page)
        with transaction(self._engine) as connection:
            return connection.execute(named).rowcount == 1

    def run_id(self, tracker: str, subject: str) -> str | None:
        """The tracker's id of a job's or study's run, if it has begun."""
        with transaction(self._engine, read_only=True) as connection:
            found = select(_runs.run_id).where(*_row(tracker, subject))
            return connection.execute(found).scalar_one_or_none()

    def told(self, due: DueRun, *, lines: int, again_s: float | None) -> bool:
        """The tracker knows the row as it was taken. It is due again at once if it changed since, else in `again_s` seconds, or never."""
        rest = None if again_s is None else db_now(again_s)
        with transaction(self._engine) as connection:
            values = {"told": due.changed, "lines": lines, "attempts": 0, "error": None}
            unchanged = (*_held(due), _runs.changed == due.changed)
            if connection.execute(update(tracked_runs).where(*unchanged).values(next_at=rest, **values)).rowcount:
                return True
            changed = update(tracked_runs).where(*_held(due)).values(next_at=db_now(), **values)
            return connection.execute(changed).rowcount == 1

    def failed(self, due: DueRun, error: str) -> bool:
        """Tell it again after a pause, which doubles with each failure up to a quarter of an hour."""
        pause = min(_LONGEST_PAUSE_S, 2.0 ** min(due.attempts, 20))
        values = {"next_at": db_now(pause), "error": clean_text(error)[:500]}
        with transaction(self._engine) as connection:
            return connection.execute(update(tracked_runs).where(*_held(due)).values(**values)).rowcount == 1

    def drop(self, due: DueRun) -> None:
        """Forget a row whose job or study was deleted."""
        with transaction(self._engine) as connection:
            connection.execute(delete(tracked_runs).where(*_held(due)))

    def pending(self) -> dict[str, int]:
        """Tracker → number of rows that it was not told of yet."""
        waits = func.count().filter(_runs.changed > _runs.told)
        query = select(trackers.c.name, waits).join_from(trackers, tracked_runs, isouter=True)
        with transaction(self._engine, read_only=True) as connection:
            return {row[0]: row[1] for row in connection.execute(query.group_by(trackers.c.name))}

    def of(self, subject: str) -> list[TrackedView]:
        """What each tracker was told of a job or study."""
        query = select(tracked_runs).where(_runs.subject == subject).order_by(_runs.tracker)
        with transaction(self._engine, read_only=True) as connection:
            return [
                TrackedView(
                    tracker=row.tracker,
                    run_id=row.run_id,
                    page=row.page,
                    up_to_date=row.changed == row.told,
                    attempts=row.attempts,
                    error=row.error,
                )
                for row in connection.execute(query)
            ]

    def forget(self, older_than_s: float) -> int:
        """Delete rows that are older than `older_than_s` seconds, also those that no tracker ever took. Returns their number."""
        old = _runs.created_at < db_now(-older_than_s)
        with transaction(self._engine) as connection:
            return connection.execute(delete(tracked_runs).where(old)).rowcount


def _row(tracker: str, subject: str) -> tuple[ColumnElement[bool], ...]:
    return (_runs.tracker == tracker, _runs.subject == subject)


def _held(due: DueRun) -> tuple[ColumnElement[bool], ...]:
    return (*_row(due.tracker, due.subject), _runs.attempts == due.attempts, _runs.next_at == due.until)
