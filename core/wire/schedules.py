"""Schedules and their runs on the wire."""

import datetime as dt
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from nightpress.core.recipes.models import Name
from nightpress.core.wire.base import Request, View
from nightpress.core.wire.costs import CostView
from nightpress.core.wire.jobs import JobRequest, JobState
from nightpress.core.wire.studies import StudyRequest, StudyState

Overlap = Literal["skip", "queue", "replace"]
CatchUp = Literal["none", "latest", "all"]
CronText = Annotated[str, Field(min_length=9, max_length=200, examples=["0 2 * * *"])]
ZoneText = Annotated[str, Field(max_length=64, examples=["Europe/Berlin"])]


class ScheduleCreate(Request):
    """A job to submit, or a study to begin, again and again.

    `study`: in place of `job`. Each fire begins a study, which first tries the best recipes of the study before.

    `overlap`: what to do where the run before is not over: skip this one, queue it behind, or replace (cancel) the other.
    `catch_up`: after the service was down, run none of the missed fires, the latest alone, or all.
    `source`: where the model comes from, `s3://…`, `hf://…` or a server folder. Each fire looks there; what is new is fetched
    and registered under the name `job.model` before the job is submitted.
    `only_if_changed`: skip where all that decides the result is as it was for the last run that did not fail: the source's revision
    or the model's bytes, the recipe, the data sets and the engine's version.
    """

    name: Name
    cron: CronText
    timezone: ZoneText = "UTC"
    job: JobRequest | None = None
    study: StudyRequest | None = None
    source: str | None = Field(None, min_length=1, max_length=1024, examples=["s3://models/released/minilm"])
    overlap: Overlap = "skip"
    catch_up: CatchUp = "latest"
    only_if_changed: bool = False
    suspended: bool = False

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if (self.job is None) == (self.study is None):
            raise ValueError("give a `job` or a `study`, and not both")
        return self


class ScheduleUpdate(Request):
    """What to change; the rest stays. Edits count `version` up, which is also the ETag.

    `source: null` takes the source away: the schedule then presses what is registered. Null elsewhere changes nothing.
    """

    name: Name | None = None
    cron: CronText | None = None
    timezone: ZoneText | None = None
    job: JobRequest | None = None
    study: StudyRequest | None = None
    source: str | None = Field(None, min_length=1, max_length=1024)
    overlap: Overlap | None = None
    catch_up: CatchUp | None = None
    only_if_changed: bool | None = None
    suspended: bool | None = None

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.job is not None and self.study is not None:
            raise ValueError("give a `job` or a `study`, and not both")
        return self


class ScheduleView(View):
    """A schedule. `job`: what is submitted; of a schedule with a `study`, its model and the word `study` as the recipe."""

    id: str
    name: str
    cron: str
    timezone: str
    job: JobRequest
    study: StudyRequest | None = None
    source: str | None = None
    overlap: Overlap
    catch_up: CatchUp
    only_if_changed: bool
    suspended: bool
    version: int
    upcoming: list[dt.datetime]  #: the next fires, in UTC; none while suspended
    cost: CostView | None = (
        None  #: of the runs' jobs and studies that are kept; null where the operator has set no prices
    )
    created_by: str | None
    created_at: dt.datetime
    updated_at: dt.datetime


class ScheduleRunView(View):
    """One fire and its outcome. `skipped` has a `reason`, `failed` an `error`, `submitted` a job or a study."""

    id: str
    schedule_id: str
    scheduled_for: dt.datetime
    cause: Literal["cron", "manual"]
    state: Literal["pending", "submitted", "skipped", "failed"]
    reason: Literal["overlap", "unchanged", "missed", "replaced"] | None
    error: dict[str, Any] | None
    job_id: str | None
    job_state: JobState | None
    job_verdict: Literal["accepted", "rejected"] | None
    study_id: str | None = None
    study_state: StudyState | None = None
    study_verdict: Literal["accepted", "rejected"] | None = None
    model_id: str | None = None  #: what was fetched for it, where the schedule has a source
    revision: str | None = None  #: of the source
    created_at: dt.datetime
