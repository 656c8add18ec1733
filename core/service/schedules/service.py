"""The operations on schedules that the API offers: create, read, edit, suspend, resume, trigger, delete."""

import datetime as dt
from typing import Any

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.service import JobService
from nightpress.core.service.schedules.cron import Cron, parse_cron
from nightpress.core.service.schedules.store import ScheduleStore
from nightpress.core.service.studies.service import StudyService
from nightpress.core.settings import Settings
from nightpress.core.sources.address import check_source
from nightpress.core.versions import changed_since
from nightpress.core.wire.schedules import ScheduleCreate, ScheduleRunView, ScheduleUpdate, ScheduleView


class ScheduleService:
    """Checks requests, and writes through the store. Safe to share between threads."""

    def __init__(self, store: ScheduleStore, jobs: JobService, studies: StudyService, settings: Settings) -> None:
        self.store = store
        self._jobs = jobs
        self._studies = studies
        self._settings = settings

    def create(self, tenant_id: str, wanted: ScheduleCreate, *, key_id: str | None = None) -> ScheduleView:
        """Create a schedule. Raises invalid_schedule, conflict, quota_exceeded, and what submitting its job now would raise.

        A model that is missing or not ready, and a job that fits no worker, are no errors here.
        """
        now = self.store.now()
        cron = self._cron(wanted.cron, wanted.timezone, now)
        self._check(tenant_id, wanted)
        self._check_source(wanted.source)
        next_at = None if wanted.suspended else _first(cron, now)
        values = wanted.model_dump(mode="json") | {"cron": cron.expression, "next_at": next_at} | _what(wanted)
        return self.store.create(tenant_id, values, key_id=key_id)

    def edit(
        self, tenant_id: str, reference: str, wanted: ScheduleUpdate, *, version: int | None = None
    ) -> ScheduleView:
        """Change the given fields. Raises precondition_failed if `version` is given and is no longer the schedule's version."""
        schedule = self.store.get(tenant_id, reference)
        if version is not None and version != schedule.version:
            raise changed_since()
        values: dict[str, Any] = wanted.model_dump(mode="json", exclude_none=True)
        if "source" in wanted.model_fields_set:  # null removes the source
            values["source"] = wanted.source
        self._check(tenant_id, wanted)
        values |= _what(wanted)
        self._check_source(wanted.source)
        suspended = schedule.suspended if wanted.suspended is None else wanted.suspended
        now = self.store.now()
        cron = self._cron(wanted.cron or schedule.cron, wanted.timezone or schedule.timezone, now)
        moved = (cron.expression, cron.timezone) != (schedule.cron, schedule.timezone)
        if suspended:
            values["next_at"] = None
        elif moved or schedule.suspended:
            # Fires that were missed while it was suspended, or at its old times, are not caught up.
            values["next_at"] = _first(cron, now)
        return self.store.edit(tenant_id, schedule, values | {"cron": cron.expression})

    def delete(self, tenant_id: str, reference: str, *, version: int | None = None) -> None:
        self.store.delete(tenant_id, reference, version=version)

    def trigger(self, tenant_id: str, reference: str) -> ScheduleRunView:
        """Fire now, even if the schedule is suspended. The rule `overlap` applies; `only_if_changed` does not."""
        return self.store.trigger(tenant_id, self.store.get(tenant_id, reference).id)

    def _cron(self, expression: str, timezone: str, now: dt.datetime) -> Cron:
        return parse_cron(expression, timezone, min_interval_s=self._settings.schedule_min_interval_s, now=now)

    def _check_source(self, source: str | None) -> None:
        if source is not None:
            check_source(source, self._settings)

    def _check(self, tenant_id: str, wanted: ScheduleCreate | ScheduleUpdate) -> None:
        try:
            if wanted.job is not None:
                self._jobs.check(tenant_id, wanted.job)
            if wanted.study is not None:
                self._studies.check(tenant_id, wanted.study)
        except NightpressError as error:
            # A missing model may exist by the time of the fire, but a wrong recipe stays wrong.
            if error.code not in {ErrorCode.NOT_FOUND, ErrorCode.CONFLICT, ErrorCode.CANNOT_FIT}:
                raise


def _what(wanted: ScheduleCreate | ScheduleUpdate) -> dict[str, Any]:
    """The columns that say what a fire submits; none if an edit doesn't change it.

    A schedule with a study still has a job, because control processes of earlier versions read it. They refuse its recipe.
    """
    if wanted.study is not None:
        study = wanted.study.model_dump(mode="json", exclude_unset=True)
        return {"job": {"model": wanted.study.model, "recipe": "study"}, "study": study}
    if wanted.job is not None:
        return {"job": wanted.job.model_dump(mode="json", exclude_none=True), "study": None}
    return {}


def _first(cron: Cron, now: dt.datetime) -> dt.datetime:
    fire = cron.next(now)
    if fire is None:
        raise NightpressError(
            ErrorCode.INVALID_SCHEDULE, f"{cron.expression!r} never fires.", hint="Is there such a date?"
        )
    return fire
