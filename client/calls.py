"""Every request of the API as a value: method, path, body, and how to read the answer. Nothing is sent here.

`Client` and `AsyncClient` differ only in how they send a `Call`.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter

from nightpress.core.recipes.plan import Plan
from nightpress.core.wire.base import Page
from nightpress.core.wire.jobs import (
    ArtifactView,
    CancelledView,
    EventView,
    JobBatch,
    JobCreate,
    JobFilter,
    JobRequest,
    JobView,
    LogView,
    ReportView,
)
from nightpress.core.wire.models import DataSetCreate, DataSetView, ModelCreate, ModelView, UploadFile
from nightpress.core.wire.promotions import LatestView, PromotionCreate, PromotionView
from nightpress.core.wire.recipes import RecipeView, ValidateRequest, ValidateView
from nightpress.core.wire.schedules import ScheduleCreate, ScheduleRunView, ScheduleUpdate, ScheduleView
from nightpress.core.wire.system import QueueView, ReadyView, WorkerView

Answer = TypeVar("Answer")
_HASHING_S = 3600.0  #: to read a model of some terabytes from a server's disk


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request. `repeatable`: sending it twice does no more than sending it once, so a broken connection may be retried.

    All are but an edit of a named version: every POST carries a key under which the server does it once.
    """

    method: str
    path: str
    parse: Callable[[httpx.Response], Answer]
    repeatable: bool = True
    params: Sequence[tuple[str, str]] = ()
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    accept: frozenset[int] = frozenset()  #: statuses ≥ 400 that are answers and not errors
    timeout_s: float | None = None  #: where the server has long work to do before it can answer


def reader(kind: Any) -> Callable[[httpx.Response], Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    return lambda response: adapter.validate_json(response.content)


def _items(kind: Any) -> Callable[[httpx.Response], Any]:
    """Read a page for its items: for lists that never need a second one."""
    adapter: TypeAdapter[Any] = TypeAdapter(Page[kind])
    return lambda response: adapter.validate_json(response.content).items


def nothing(_response: httpx.Response) -> None:
    return None


def _text(response: httpx.Response) -> str:
    return response.text


_LATEST, _PROMOTION, _PROMOTIONS = reader(LatestView), reader(PromotionView), reader(Page[PromotionView])
_MODEL, _MODELS = reader(ModelView), reader(Page[ModelView])
_DATA_SET, _DATA_SETS = reader(DataSetView), reader(Page[DataSetView])
_JOB, _JOBS, _JOB_LIST = reader(JobView), reader(Page[JobView]), _items(JobView)
_CANCELLED = reader(CancelledView)
_UPLOADS = _items(UploadFile)
_RECIPE, _RECIPES = reader(RecipeView), _items(RecipeView)
_ARTIFACTS, _WORKERS, _QUEUES = _items(ArtifactView), _items(WorkerView), _items(QueueView)
_EVENTS, _LOGS = _items(EventView), _items(LogView)
_REPORT, _READY = reader(ReportView), reader(ReadyView)
_SCHEDULE, _SCHEDULES = reader(ScheduleView), reader(Page[ScheduleView])
_RUN, _RUNS = reader(ScheduleRunView), reader(Page[ScheduleRunView])
_VALIDATED = reader(ValidateView)
_JSON = reader(dict[str, Any])


def path_of(*parts: str) -> str:
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def given(**params: object) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in params.items() if value is not None]


def if_match(version: int | None) -> dict[str, str]:
    """A header that lets an edit of this version alone succeed. Repeated after a lost answer it would be refused."""
    return {"If-Match": f'"v{version}"'} if version is not None else {}


def post(
    path: str,
    parse: Callable[[httpx.Response], Answer],
    body: BaseModel | None = None,
    *,
    key: str | None = None,
    timeout_s: float | None = None,
) -> Call[Answer]:
    """A POST with an Idempotency-Key. It is made here, once a call and not once a try, so that a retry finds what the try before it did."""
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    json = None if body is None else body.model_dump(mode="json", exclude_unset=True)
    return Call("POST", path, parse, json=json, headers=headers, timeout_s=timeout_s)


# Models and data sets ------------------------------------------------------------------------------------------------


def create_model(request: ModelCreate) -> Call[ModelView]:
    return post("/v1/models", _MODEL, request, timeout_s=_HASHING_S)


def get_model(model: str) -> Call[ModelView]:
    return Call("GET", path_of("models", model), _MODEL)


def latest_of(model: str) -> Call[LatestView]:
    """The newest accepted result of a model's name. Raises ApiError(not_found) where none was accepted yet."""
    return Call("GET", path_of("models", model, "latest"), _LATEST)


def page_promotions(model: str, *, cursor: str | None = None, limit: int = 50) -> Call[Page[PromotionView]]:
    """Where a model's name stood, newest first: the first is where it stands."""
    return Call("GET", path_of("models", model, "promotions"), _PROMOTIONS, params=given(cursor=cursor, limit=limit))


def promote(model: str, job_id: str) -> Call[PromotionView]:
    """Let a model's name mean another job's accepted result, e.g. to go back. Holds until the next job of this name is accepted."""
    return post(path_of("models", model, "promotions"), _PROMOTION, PromotionCreate(job_id=job_id))


def page_models(*, cursor: str | None = None, limit: int = 50) -> Call[Page[ModelView]]:
    return Call("GET", "/v1/models", _MODELS, params=given(cursor=cursor, limit=limit))


def delete_model(model: str) -> Call[None]:
    return Call("DELETE", path_of("models", model), nothing)


def create_data_set(request: DataSetCreate) -> Call[DataSetView]:
    return post("/v1/datasets", _DATA_SET, request, timeout_s=_HASHING_S)


def get_data_set(data_set: str) -> Call[DataSetView]:
    return Call("GET", path_of("datasets", data_set), _DATA_SET)


def page_data_sets(*, cursor: str | None = None, limit: int = 50) -> Call[Page[DataSetView]]:
    return Call("GET", "/v1/datasets", _DATA_SETS, params=given(cursor=cursor, limit=limit))


def delete_data_set(data_set: str) -> Call[None]:
    return Call("DELETE", path_of("datasets", data_set), nothing)


def uploads(kind: str, subject: str) -> Call[list[UploadFile]]:
    """The parts not yet received, with fresh URLs. `kind`: "models" or "datasets"."""
    return Call("GET", path_of(kind, subject, "uploads"), _UPLOADS)


def complete(kind: str, subject: str) -> Call[None]:
    return post(path_of(kind, subject, "complete"), nothing, timeout_s=_HASHING_S)


def upload_state(kind: str, subject: str) -> Call[str]:
    return Call("GET", path_of(kind, subject), lambda response: str(response.json()["state"]))


# Recipes -------------------------------------------------------------------------------------------------------------


def list_recipes() -> Call[list[RecipeView]]:
    return Call("GET", "/v1/recipes", _RECIPES)


def get_recipe(name: str) -> Call[RecipeView]:
    return Call("GET", path_of("recipes", name), _RECIPE)


def validate_recipe(recipe: dict[str, Any] | str, model: str | None = None) -> Call[Plan]:
    """The plan, estimate and warnings for a recipe given as a mapping or YAML text. Raises ApiError(invalid_recipe)."""
    body = ValidateRequest(recipe=recipe, model=model).model_dump(mode="json")
    return Call("POST", "/v1/recipes/validate", lambda response: _VALIDATED(response).plan, json=body)


def recipe_schema() -> Call[dict[str, Any]]:
    """The JSON schema of a recipe, for editors."""
    return Call("GET", "/v1/recipes/schema", _JSON)


# Jobs ----------------------------------------------------------------------------------------------------------------


def submit_job(
    model: str, recipe: str | dict[str, Any], *, idempotency_key: str | None = None, **fields: Any
) -> Call[JobView]:
    """Queue a job. `fields`: those of core.wire.jobs.JobCreate (name, priority, labels, run_after, …).

    The request carries a fresh Idempotency-Key, so that a retry over a bad line makes no second job; give your own to extend
    that over several runs of a program.
    """
    request = JobCreate(model=model, recipe=recipe, **fields)
    return post("/v1/jobs", _JOB, request, key=idempotency_key)


def submit_jobs(jobs: Sequence[JobCreate], *, idempotency_key: str | None = None) -> Call[list[JobView]]:
    """Queue up to 100 jobs, all or none."""
    return post("/v1/jobs:batch", _JOB_LIST, JobBatch(jobs=list(jobs)), key=idempotency_key)


def cancel_jobs(wanted: JobFilter) -> Call[CancelledView]:
    """Cancel every job that matches, a bounded number at a time: `more` says whether to ask again."""
    return post("/v1/jobs:cancel", _CANCELLED, wanted)


def get_job(job_id: str) -> Call[JobView]:
    return Call("GET", path_of("jobs", job_id), _JOB)


def page_jobs(
    *,
    states: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    model: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Call[Page[JobView]]:
    params = [("state", state) for state in states]
    params += [("label", f"{key}={value}") for key, value in (labels or {}).items()]
    return Call("GET", "/v1/jobs", _JOBS, params=params + given(model=model, cursor=cursor, limit=limit))


def cancel_job(job_id: str) -> Call[JobView]:
    return post(path_of("jobs", job_id, "cancel"), _JOB)


def retry_job(job_id: str) -> Call[JobView]:
    """A new job like a finished one."""
    return post(path_of("jobs", job_id, "retry"), _JOB)


def list_events(job_id: str, *, after: int = 0, limit: int = 500) -> Call[list[EventView]]:
    return Call("GET", path_of("jobs", job_id, "events"), _EVENTS, params=given(after=after, limit=limit))


def list_logs(job_id: str, *, after: int = 0, limit: int = 500) -> Call[list[LogView]]:
    return Call("GET", path_of("jobs", job_id, "logs"), _LOGS, params=given(after=after, limit=limit))


def list_artifacts(job_id: str) -> Call[list[ArtifactView]]:
    return Call("GET", path_of("jobs", job_id, "artifacts"), _ARTIFACTS)


def get_report(job_id: str) -> Call[ReportView]:
    return Call("GET", path_of("jobs", job_id, "report"), _REPORT)


def get_drawn_report(job_id: str, form: Literal["html", "md"]) -> Call[str]:
    """The report as one self-contained page or as a Markdown model card."""
    return Call("GET", path_of("jobs", job_id, f"report.{form}"), _text)


# Schedules -----------------------------------------------------------------------------------------------------------


def create_schedule(
    name: str, cron: str, model: str, recipe: str | dict[str, Any], *, timezone: str = "UTC", **fields: Any
) -> Call[ScheduleView]:
    """`fields`: those of core.wire.schedules.ScheduleCreate (overlap, catch_up, only_if_changed, suspended) and of JobRequest."""
    own = {key: value for key, value in fields.items() if key in ScheduleCreate.model_fields}
    rest = {key: value for key, value in fields.items() if key not in own}
    job = JobRequest(model=model, recipe=recipe, **rest)
    return post("/v1/schedules", _SCHEDULE, ScheduleCreate(name=name, cron=cron, timezone=timezone, job=job, **own))


def get_schedule(schedule: str) -> Call[ScheduleView]:
    return Call("GET", path_of("schedules", schedule), _SCHEDULE)


def page_schedules(*, cursor: str | None = None, limit: int = 50) -> Call[Page[ScheduleView]]:
    return Call("GET", "/v1/schedules", _SCHEDULES, params=given(cursor=cursor, limit=limit))


def edit_schedule(schedule: str, *, version: int | None = None, **changes: Any) -> Call[ScheduleView]:
    """Change what is given; `source=None` takes the source away. With `version`, only while it is still that one: else ApiError(precondition_failed)."""
    body = ScheduleUpdate(**changes).model_dump(mode="json", exclude_unset=True)
    headers = if_match(version)
    return Call("PATCH", path_of("schedules", schedule), _SCHEDULE, repeatable=not headers, json=body, headers=headers)


def delete_schedule(schedule: str, *, version: int | None = None) -> Call[None]:
    """With `version`, only while it is still that one: else ApiError(precondition_failed)."""
    return Call("DELETE", path_of("schedules", schedule), nothing, headers=if_match(version))


def suspend_schedule(schedule: str) -> Call[ScheduleView]:
    return post(path_of("schedules", schedule, "suspend"), _SCHEDULE)


def resume_schedule(schedule: str) -> Call[ScheduleView]:
    return post(path_of("schedules", schedule, "resume"), _SCHEDULE)


def trigger_schedule(schedule: str) -> Call[ScheduleRunView]:
    """Fire now. The run's job appears within a few seconds."""
    return post(path_of("schedules", schedule, "trigger"), _RUN)


def page_schedule_runs(schedule: str, *, cursor: str | None = None, limit: int = 50) -> Call[Page[ScheduleRunView]]:
    """What each fire came to, newest first."""
    return Call("GET", path_of("schedules", schedule, "runs"), _RUNS, params=given(cursor=cursor, limit=limit))


# The service ---------------------------------------------------------------------------------------------------------


def list_workers() -> Call[list[WorkerView]]:
    return Call("GET", "/v1/workers", _WORKERS)


def list_queues() -> Call[list[QueueView]]:
    """What waits and what runs, over all tenants."""
    return Call("GET", "/v1/queues", _QUEUES)


def ready() -> Call[ReadyView]:
    """What the API says of the parts it needs; needs no key."""
    return Call("GET", "/readyz", _READY, accept=frozenset({503}))
