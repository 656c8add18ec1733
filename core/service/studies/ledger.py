"""What the control process writes about studies: each ask and each tell is one transaction with a guard.

So any number of replicas may do it at the same time, and any may be killed: a trial's row is written together with its job, under the
number that the study's row gives out once; a result is taken from a trial that is still open.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from sqlalchemy import ColumnElement, Engine, func, insert, or_, select, update
from sqlalchemy.engine import Connection

from nightpress.core.database import UtcDateTime, db_now, read_now, transaction
from nightpress.core.service.costs.ledger import costs_of
from nightpress.core.service.costs.prices import MICROS, UNPRICED, PriceList
from nightpress.core.service.jobs.records import Job, NewJob
from nightpress.core.service.jobs.submission import insert_jobs
from nightpress.core.service.promotions.store import promote_accepted
from nightpress.core.service.studies.records import Ended, NewTrial, Outcome, Progress, Study, Trial
from nightpress.core.service.tables.jobs import job_attempts, jobs
from nightpress.core.service.tables.studies import studies, study_events, study_trials
from nightpress.core.service.trackers.outbox import note_for_trackers
from nightpress.core.service.webhooks.outbox import note_event
from nightpress.core.wire.jobs import TERMINAL_STATES
from nightpress.core.wire.studies import Reason

STUDY_COLUMNS = tuple(studies.c[field.name] for field in fields(Study))
_TRIAL_COLUMNS = tuple(study_trials.c[field.name] for field in fields(Trial))
_trials = study_trials.c
_ENDED = frozenset({"succeeded", "failed", "cancelled"})


class StudyLedger:
    """Asks and tells. Every method that writes returns whether it did: False if another replica was faster, or the study has moved on."""

    def __init__(self, engine: Engine, prices: PriceList = UNPRICED) -> None:
        self._engine = engine
        self.prices = prices

    def active(self) -> list[Study]:
        """The studies of all tenants that have not ended, oldest first."""
        query = select(*STUDY_COLUMNS).where(studies.c.finished_at.is_(None)).order_by(studies.c.created_at)
        with transaction(self._engine, read_only=True) as connection:
            return [Study(*row) for row in connection.execute(query)]

    def trials(self, study_id: str, *, start: int = 0) -> list[Trial]:
        """The study's trials from number `start` on, in the order of their numbers."""
        query = select(*_TRIAL_COLUMNS).where(_trials.study_id == study_id, _trials.number >= start)
        query = query.order_by(_trials.number)
        with transaction(self._engine, read_only=True) as connection:
            return [Trial(*row) for row in connection.execute(query)]

    def recipe(self, study_id: str, number: int) -> dict[str, Any]:
        """The normalised recipe of a trial."""
        query = select(_trials.recipe).where(_trials.study_id == study_id, _trials.number == number)
        with transaction(self._engine, read_only=True) as connection:
            found: dict[str, Any] = connection.execute(query).scalar_one()
        return found

    def ended(self, study_id: str) -> list[Ended]:
        """The open trials whose jobs have ended or are gone."""
        query = (
            select(_trials.number, _trials.role, _trials.recipe, _trials.job_id, jobs.c.state, jobs.c.error)
            .join_from(study_trials, jobs, jobs.c.id == _trials.job_id, isouter=True)
            .where(_trials.study_id == study_id, _trials.state == "open")
            .where(or_(jobs.c.id.is_(None), jobs.c.state.in_(sorted(TERMINAL_STATES))))
            .order_by(_trials.number)
        )
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query).all()
            job_ids = [row.job_id for row in rows if row.job_id]
            spent = _spent(connection, job_ids)
            costs = costs_of(connection, self.prices, job_ids) if self.prices else {}
        return [
            Ended(*row, *spent.get(row.job_id or "", (0.0, 0.0)), cost_micros=costs.get(row.job_id or "", 0))
            for row in rows
        ]

    def progress(self, study_id: str) -> Progress:
        """The study's state, its open trials, and what it has spent."""
        row = select(studies.c.state, studies.c.proposed, studies.c.cpu_s, studies.c.gpu_s, studies.c.deadline_at)
        row = row.add_columns(studies.c.cost_micros)
        opened = select(_trials.number, _trials.job_id).where(_trials.study_id == study_id, _trials.state == "open")
        with transaction(self._engine, read_only=True) as connection:
            study = connection.execute(row.where(studies.c.id == study_id)).one()
            still = connection.execute(opened.order_by(_trials.number)).all()
            job_ids = [trial.job_id for trial in still if trial.job_id]
            running = _spent(connection, job_ids).values()
            costs = costs_of(connection, self.prices, job_ids) if self.prices else {}
            now = read_now(connection)
        return Progress(
            state=study.state,
            proposed=study.proposed,
            open_jobs=tuple(job_ids),
            first_open=still[0].number if still else None,
            cpu_s=study.cpu_s + sum(cpu for cpu, _ in running),
            gpu_s=study.gpu_s + sum(gpu for _, gpu in running),
            cost=(study.cost_micros + sum(costs.values())) / MICROS,
            overdue=now >= study.deadline_at,
            at=now,
        )

    def begin_trial(self, study: Study, trial: NewTrial, new: NewJob, *, max_queued: int) -> Job | None:
        """Write a trial and its job. None: another replica has given this number to a trial, or the study takes no more trials.

        Raises NightpressError(quota_exceeded); then nothing is written.
        """
        with transaction(self._engine) as connection:
            if not self._number(connection, study, trial, {}):
                return None
            [job] = insert_jobs(connection, [replace(new, study_id=study.id)], max_queued=max_queued)
            connection.execute(_insert(study, trial).values(state="open", job_id=job.id))
            _note(connection, study.id, "trial_started", {**_told(trial), "job_id": job.id})
        return job

    def refuse_trial(self, study: Study, trial: NewTrial, reason: str) -> bool:
        """Write a trial that can't run, e.g. because no worker could hold it."""
        with transaction(self._engine) as connection:
            if not self._number(connection, study, trial, {"told": studies.c.told + 1}):
                return False
            ended = _insert(study, trial).values(state="refused", reason=reason, ended_at=db_now())
            connection.execute(ended)
            _note(connection, study.id, "trial_ended", {**_told(trial), "state": "refused", "reason": reason})
        return True

    def _number(self, connection: Connection, study: Study, trial: NewTrial, values: dict[str, Any]) -> bool:
        """Take the trial's number, if it is the next and the study still takes trials of this role."""
        state = "searching" if trial.role == "search" else "judging"
        guards = (studies.c.id == study.id, studies.c.state == state, studies.c.proposed == trial.number)
        taken = update(studies).where(*guards).values(proposed=trial.number + 1, **values)
        return connection.execute(taken).rowcount == 1

    def tell(self, study_id: str, ended: Ended, outcome: Outcome) -> bool:
        """open → the outcome's state, with its figures and its cost."""
        figures = asdict(outcome)
        with transaction(self._engine) as connection:
            still = (_trials.study_id == study_id, _trials.number == ended.number, _trials.state == "open")
            costs = {"cpu_s": ended.cpu_s, "gpu_s": ended.gpu_s, "cost_micros": ended.cost_micros, "ended_at": db_now()}
            if not connection.execute(update(study_trials).where(*still).values(**figures, **costs)).rowcount:
                return False
            data = {"number": ended.number, "role": ended.role, "state": outcome.state, "goal": outcome.goal}
            _note(
                connection,
                study_id,
                "trial_ended",
                data | {"margin": outcome.margin, "reason": outcome.reason},
                told=studies.c.told + 1,
                cpu_s=studies.c.cpu_s + ended.cpu_s,
                gpu_s=studies.c.gpu_s + ended.gpu_s,
                cost_micros=studies.c.cost_micros + ended.cost_micros,
            )
        return True

    def end_search(self, study: Study, reason: Reason) -> bool:
        """searching → judging."""
        return self._move(study, "searching", "judging", {"reason": reason}, state="judging", reason=reason)

    def succeed(self, study: Study, report: dict[str, Any], *, winner: Trial | None) -> bool:
        """judging → succeeded. With a winner the verdict is accepted, and its result is promoted if the study wants that."""
        verdict = "rejected" if winner is None else "accepted"
        with transaction(self._engine) as connection:
            done = self._moved(
                connection,
                study,
                "judging",
                "succeeded",
                {"verdict": verdict, "job_id": None if winner is None else winner.job_id},
                state="succeeded",
                verdict=verdict,
                report=report,
                winner=None if winner is None else winner.number,
                finished_at=db_now(),
            )
            if done and winner is not None and winner.job_id is not None and study.promote:
                accepted = (jobs.c.id == winner.job_id, jobs.c.verdict == "accepted", jobs.c.artifacts_state == "kept")
                if connection.execute(select(jobs.c.id).where(*accepted).with_for_update()).one_or_none() is not None:
                    promote_accepted(connection, study.tenant_id, study.model_name, winner.job_id)
        return done

    def fail(self, study: Study, error: dict[str, Any], reason: Reason | None = None) -> bool:
        """searching | judging → failed. Its open trials end with it."""
        ended = {"state": "failed", "error": error, "reason": reason or study.reason, "finished_at": db_now()}
        with transaction(self._engine) as connection:
            if not self._moved(connection, study, study.state, "failed", {"error": error}, **ended):
                return False
            still = (_trials.study_id == study.id, _trials.state == "open")
            over = {"state": "cancelled", "reason": "The study failed.", "ended_at": db_now()}
            connection.execute(update(study_trials).where(*still).values(**over))
        return True

    def cancelled(self, study: Study) -> bool:
        """cancelling → cancelled: no trial is open any more."""
        return self._move(study, "cancelling", "cancelled", {}, state="cancelled", finished_at=db_now())

    def _move(self, study: Study, source: str, kind: str, data: dict[str, Any], **values: Any) -> bool:
        with transaction(self._engine) as connection:
            return self._moved(connection, study, source, kind, data, **values)

    def _moved(
        self, connection: Connection, study: Study, source: str, kind: str, data: dict[str, Any], **values: Any
    ) -> bool:
        done = _note(connection, study.id, kind, data, studies.c.state == source, **values)
        if done and kind in _ENDED:
            told = {"id": study.id, "name": study.name, "model_name": study.model_name, "labels": study.labels}
            note_event(connection, study.tenant_id, f"study.{kind}", {**told, "state": kind, **data})
        return done

    def forget(self, older_than_s: float) -> int:
        """Delete studies that ended more than `older_than_s` seconds ago. Their jobs are pruned by themselves. Returns their number."""
        with transaction(self._engine) as connection:
            old = studies.c.finished_at < db_now(-older_than_s)
            return connection.execute(studies.delete().where(old)).rowcount


def _note(
    connection: Connection, study_id: str, kind: str, data: dict[str, Any], *guards: ColumnElement[bool], **values: Any
) -> bool:
    """Update the study if it meets the guards, and add an event. The same UPDATE counts the event, so that numbers have no gaps."""
    counted = (
        update(studies).where(studies.c.id == study_id, *guards).values(event_seq=studies.c.event_seq + 1, **values)
    )
    seq = connection.execute(counted.returning(studies.c.event_seq)).scalar_one_or_none()
    if seq is None:
        return False
    connection.execute(insert(study_events).values(study_id=study_id, seq=seq, at=db_now(), kind=kind, data=data))
    note_for_trackers(connection, study_id)
    return True


def request_cancel(connection: Connection, tenant_id: str, study_id: str) -> bool:
    """searching | judging → cancelling. False: there is no such study, or it has ended or is being cancelled."""
    guards = (studies.c.tenant_id == tenant_id, studies.c.state.in_(("searching", "judging")))
    return _note(connection, study_id, "cancel_requested", {}, *guards, state="cancelling", reason="cancelled")


def _insert(study: Study, trial: NewTrial) -> Any:
    values = {**asdict(trial), "params": dict(trial.params), "study_id": study.id, "created_at": db_now()}
    return insert(study_trials).values(**values)


def _told(trial: NewTrial) -> dict[str, Any]:
    return {"number": trial.number, "role": trial.role, "judges": trial.judges, "known": trial.known}


def _spent(connection: Connection, job_ids: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Job → seconds that CPU workers and GPUs spent on it until now. A job on n GPUs takes n GPU seconds a second."""
    if not job_ids:
        return {}
    query = (
        select(
            jobs.c.id,
            jobs.c.queue,
            jobs.c.needs_gpus,
            job_attempts.c.started_at,
            func.coalesce(job_attempts.c.finished_at, db_now(), type_=UtcDateTime),
        )
        .join_from(jobs, job_attempts, job_attempts.c.job_id == jobs.c.id)
        .where(jobs.c.id.in_(job_ids))
    )
    found: dict[str, tuple[float, float]] = {}
    for job_id, queue, gpus, started, ended in connection.execute(query):
        seconds = max(0.0, (ended - started).total_seconds())
        cpu, gpu = found.get(job_id, (0.0, 0.0))
        found[job_id] = (cpu, gpu + gpus * seconds) if queue == "gpu" else (cpu + seconds, gpu)
    return found
