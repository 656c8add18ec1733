"""The requests about schedules, as values; see client/calls.py."""

from collections.abc import Mapping
from typing import Any

from nightpress.client.calls import Call, if_match, nothing, path_of, post, query, reader
from nightpress.core.wire.base import Page
from nightpress.core.wire.jobs import JobRequest
from nightpress.core.wire.schedules import ScheduleCreate, ScheduleRunView, ScheduleUpdate, ScheduleView
from nightpress.core.wire.studies import StudyRequest

_SCHEDULE, _SCHEDULES = reader(ScheduleView), reader(Page[ScheduleView])
_RUN, _RUNS = reader(ScheduleRunView), reader(Page[ScheduleRunView])


def create_schedule(
    name: str,
    cron: str,
    model: str,
    recipe: str | dict[str, Any] | None = None,
    *,
    study: Mapping[str, Any] | None = None,
    timezone: str = "UTC",
    **fields: Any,
) -> Call[ScheduleView]:
    """Submit a job at each time that `cron` names, or begin a study: give a recipe, or the fields of core.wire.studies.StudyRequest.

    `fields`: further fields of core.wire.schedules.ScheduleCreate (overlap, catch_up, only_if_changed, suspended) and of JobRequest.
    """
    own = {key: value for key, value in fields.items() if key in ScheduleCreate.model_fields}
    rest = {key: value for key, value in fields.items() if key not in own}
    if study is not None:
        own["study"] = StudyRequest.model_validate({"model": model, **study, **rest})
    if recipe is not None:
        own["job"] = JobRequest(model=model, recipe=recipe, **rest)
    return post("/v1/schedules", _SCHEDULE, ScheduleCreate(name=name, cron=cron, timezone=timezone, **own))


def get_schedule(schedule: str) -> Call[ScheduleView]:
    return Call("GET", path_of("schedules", schedule), _SCHEDULE)


def page_schedules(*, cursor: str | None = None, limit: int = 50) -> Call[Page[ScheduleView]]:
    return Call("GET", "/v1/schedules", _SCHEDULES, params=query(cursor=cursor, limit=limit))


def edit_schedule(schedule: str, *, version: int | None = None, **changes: Any) -> Call[ScheduleView]:
    """Change the given fields of core.wire.schedules.ScheduleUpdate. `source=None` removes the source.

    With `version`, raises ApiError(precondition_failed) where the schedule has been changed since that version.
    """
    body = ScheduleUpdate(**changes).model_dump(mode="json", exclude_unset=True)
    headers = if_match(version)
    return Call("PATCH", path_of("schedules", schedule), _SCHEDULE, repeatable=not headers, json=body, headers=headers)


def delete_schedule(schedule: str, *, version: int | None = None) -> Call[None]:
    """Delete a schedule; its jobs stay. With `version`, raises ApiError(precondition_failed) where it has been changed since."""
    return Call("DELETE", path_of("schedules", schedule), nothing, headers=if_match(version))


def suspend_schedule(schedule: str) -> Call[ScheduleView]:
    """Submit no more jobs until the schedule is resumed."""
    return post(path_of("schedules", schedule, "suspend"), _SCHEDULE)


def resume_schedule(schedule: str) -> Call[ScheduleView]:
    """Submit jobs again, from the next due time on."""
    return post(path_of("schedules", schedule, "resume"), _SCHEDULE)


def trigger_schedule(schedule: str) -> Call[ScheduleRunView]:
    """Fire now. Returns the run; its job appears within a few seconds."""
    return post(path_of("schedules", schedule, "trigger"), _RUN)


def page_schedule_runs(schedule: str, *, cursor: str | None = None, limit: int = 50) -> Call[Page[ScheduleRunView]]:
    """A page of a schedule's runs and their outcomes, newest first."""
    return Call("GET", path_of("schedules", schedule, "runs"), _RUNS, params=query(cursor=cursor, limit=limit))
