"""The control process's work for schedules: record the fires that are due, then submit a job or begin a study for each, or record why not.

Any number of replicas may do this at the same time. A unique constraint makes sure that a fire is recorded once. A run's job is
submitted under an idempotency key of the run. So two replicas, or a replica that dies between the steps, make only one job.
"""

import datetime as dt
import logging
from collections.abc import Callable

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.service import JobService
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.schedules.bringing import Bringer
from nightpress.core.service.schedules.store import DueSchedule, LastRun, PendingRun, ScheduleStore
from nightpress.core.service.studies.service import StudyService
from nightpress.core.wire.jobs import JobCreate
from nightpress.core.wire.studies import StudyRequest

ON_TIME_S = 300.0  #: a fire recorded up to this many seconds late is not missed: the control process may have restarted
_REACH_S = 31 * 24 * 3600.0  #: longest time that catching up looks back
_MAX_RECORDED = 100  #: most fires that are recorded at once; these are the newest
_MAX_WAITING = 10  #: most runs of a schedule that wait for earlier runs; later ones are skipped
#: Errors that may pass within an hour: the run stays pending for `_PATIENCE_S` seconds.
_PATIENT = {ErrorCode.QUOTA_EXCEEDED, ErrorCode.CANNOT_FIT, ErrorCode.SOURCE_UNAVAILABLE}
_PATIENCE_S = 3600.0

log = logging.getLogger(__name__)


class Firing:
    """Fires schedules. `fire` and `advance` may run twice, and in several processes at the same time."""

    def __init__(
        self,
        schedules: ScheduleStore,
        jobs: JobService,
        store: JobStore,
        studies: StudyService,
        bringer: Bringer,
        ring: Callable[[str], None],
    ) -> None:
        self._schedules = schedules
        self._jobs = jobs
        self._studies = studies
        self._store = store
        self._bringer = bringer
        self._ring = ring

    def fire(self, now: dt.datetime | None = None) -> None:
        """Record every fire up to `now`. None: the database's time; tests give other times."""
        moment = now or self._schedules.now()
        for due in self._schedules.due(moment):
            fires = plan_fires(due, moment)
            if self._schedules.record_fires(due, fires, due.cron.next(moment)):
                log.info("Schedule %s fired for %s.", due.id, ", ".join(f"{fire:%Y-%m-%d %H:%M}Z" for fire in fires))

    def advance(self) -> None:
        """Decide each pending run. A run that fails does not stop the others."""
        for run in self._schedules.pending():
            try:
                self._decide(run)
            except NightpressError as error:
                if error.kind.retryable and error.code not in _PATIENT:
                    raise
                late = (self._schedules.now() - run.created_at).total_seconds() > _PATIENCE_S
                if error.code not in _PATIENT or late:
                    log.warning("Run %s of schedule %s: %s", run.id, run.schedule_id, error)
                    self._schedules.settle(run.id, "failed", error=error.as_dict())

    def _decide(self, run: PendingRun) -> None:
        going = self._schedules.going(run)
        if going and run.overlap == "queue":
            if len(going) > _MAX_WAITING:
                self._schedules.settle(run.id, "skipped", reason="overlap")
            return
        if going and run.overlap == "skip":
            self._schedules.settle(run.id, "skipped", reason="overlap")
            return
        last = self._schedules.last(run.schedule_id) if run.only_if_changed and run.cause == "cron" else None
        if run.source is not None and run.model_id is None:
            revision = self._bringer.look(run)
            if revision is None:
                return
            if last is not None and revision == last.revision and self._is_same_work(run, last):
                self._schedules.settle(run.id, "skipped", reason="unchanged", revision=revision)
            else:
                self._bringer.begin(run, revision)
            return
        model = run.job.model
        if run.source is not None:
            brought = self._bringer.ready(run)
            if brought is None:
                return
            model = brought.id
        # Before earlier runs are replaced, because this raises if the job can't be submitted.
        fingerprint = self._fingerprint(run, model)
        if last is not None and fingerprint == last.fingerprint:
            self._schedules.settle(run.id, "skipped", reason="unchanged")
            return
        for earlier, job_id, study_id in going:
            self._schedules.settle(earlier, "skipped", reason="replaced")
            if job_id is not None:
                self._store.requests.request_cancel(run.tenant_id, job_id)
            if study_id is not None:
                self._studies.cancel(run.tenant_id, study_id)
        if run.study is not None:
            self._begin_study(run, run.study.model_copy(update={"model": model}), fingerprint)
            return
        # Clients' idempotency keys have no spaces, so that none of them can equal this key.
        # By default a cron run reuses the result of an identical job; a run that a user triggers does not.
        reuse = run.cause == "cron" if run.job.reuse is None else run.job.reuse
        wanted = JobCreate(**{**run.job.model_dump(), "model": model, "reuse": reuse})
        job, _ = self._jobs.submit(run.tenant_id, wanted, f"schedule {run.id}", key_id=run.created_by)
        made = {"job_id": job.id, "digest": job.model_digest, "fingerprint": job.fingerprint}
        if self._schedules.settle(run.id, "submitted", **made):
            log.info("Schedule %s submitted job %s.", run.schedule_id, job.id, extra={"job_id": job.id})
            if job.state == "queued":
                self._ring(job.queue)
        elif self._schedules.run(run.id).job_id != job.id:
            # A later run replaced this one while it submitted.
            self._store.requests.request_cancel(run.tenant_id, job.id)

    def _begin_study(self, run: PendingRun, wanted: StudyRequest, fingerprint: str) -> None:
        """Begin a study that first tries the front of the schedule's last study. Its id is made of the run's, so that there is only one."""
        last = self._schedules.last(run.schedule_id)
        if last is not None and last.study_id is not None:
            wanted = wanted.model_copy(update={"start_from": last.study_id})
        study_id = f"std_{run.id.partition('_')[2]}"
        study = self._studies.create(run.tenant_id, wanted, key_id=run.created_by, study_id=study_id)
        made = {"study_id": study.id, "digest": study.model_digest, "fingerprint": fingerprint}
        if self._schedules.settle(run.id, "submitted", **made):
            log.info("Schedule %s began study %s.", run.schedule_id, study.id)
        elif self._schedules.run(run.id).study_id != study.id:
            self._studies.cancel(run.tenant_id, study.id)  # a later run replaced this one

    def _is_same_work(self, run: PendingRun, last: LastRun) -> bool:
        """Whether a job for the model of the last run would be identical to the last job."""
        try:
            return last.model_id is not None and self._fingerprint(run, last.model_id) == last.fingerprint
        except NightpressError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            return False  # the model was deleted: it is fetched again

    def _fingerprint(self, run: PendingRun, model: str) -> str:
        if run.study is not None:
            return self._studies.fingerprint(run.tenant_id, run.study.model_copy(update={"model": model}))
        return self._jobs.fingerprint(run.tenant_id, run.job.model_copy(update={"model": model}))


def plan_fires(due: DueSchedule, now: dt.datetime) -> dict[dt.datetime, str | None]:
    """The fires from `due.next_at` to `now`: fire → the reason to skip it, or None to run it."""
    start = max(due.next_at, now - dt.timedelta(seconds=_REACH_S))
    fires = [due.next_at] if start == due.next_at else []
    fires += due.cron.until(start, now)
    fires = fires[-_MAX_RECORDED:]
    if due.catch_up == "all":
        return dict.fromkeys(fires)
    if due.catch_up == "latest":
        return {fire: None if fire == fires[-1] else "missed" for fire in fires}
    on_time = now - dt.timedelta(seconds=ON_TIME_S)
    return {fire: None if fire >= on_time else "missed" for fire in fires}
