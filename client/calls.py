"""Every request of the API as a value: method, path, body, and how to read the answer. Nothing is sent here.

`Client` and `AsyncClient` differ only in how they send a `Call`.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter

from core.recipes.plan import Plan
from core.schemas import (
    ArtifactView,
    DataSetCreate,
    DataSetView,
    EventView,
    JobCreate,
    JobView,
    LatestView,
    LogView,
    ModelCreate,
    ModelView,
    Page,
    ReadyView,
    RecipeView,
    ReportView,
    ScheduleCreate,
    ScheduleRunView,
    ScheduleUpdate,
    ScheduleView,
    UploadFile,
    ValidateRequest,
    ValidateView,
    WorkerView,
)

Answer = TypeVar("Answer")
_HASHING_S = 3600.0  #: to read a model of some terabytes from a server's disk


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request. `repeatable`: sending it twice does no more than sending it once, so a broken connection may be retried."""

    method: str
    path: str
    parse: Callable[[httpx.Response], Answer]
    repeatable: bool = True
    params: Sequence[tuple[str, str]] = ()
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    accept: frozenset[int] = frozenset()  #: statuses ≥ 400 that are answers and not errors
    timeout_s: float | None = None  #: where the server has long work to do before it can answer


def _reader(kind: Any) -> Callable[[httpx.Response], Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    return lambda response: adapter.validate_json(response.content)


def _items(kind: Any) -> Callable[[httpx.Response], Any]:
    """Read a page for its items: for lists that never need a second one."""
    adapter: TypeAdapter[Any] = TypeAdapter(Page[kind])
    return lambda response: adapter.validate_json(response.content).items


def _nothing(_response: httpx.Response) -> None:
    return None


def _text(response: httpx.Response) -> str:
    return response.text


_LATEST = _reader(LatestView)
_MODEL, _MODELS = _reader(ModelView), _reader(Page[ModelView])
_DATA_SET, _DATA_SETS = _reader(DataSetView), _reader(Page[DataSetView])
_JOB, _JOBS = _reader(JobView), _reader(Page[JobView])
_UPLOADS = _items(UploadFile)
_RECIPE, _RECIPES = _reader(RecipeView), _items(RecipeView)
_ARTIFACTS, _WORKERS = _items(ArtifactView), _items(WorkerView)
_EVENTS, _LOGS = _items(EventView), _items(LogView)
_REPORT, _READY = _reader(ReportView), _reader(ReadyView)
_SCHEDULE, _SCHEDULES = _reader(ScheduleView), _reader(Page[ScheduleView])
_RUN, _RUNS = _reader(ScheduleRunView), _reader(Page[ScheduleRunView])
_VALIDATED = _reader(ValidateView)
_JSON = _reader(dict[str, Any])


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def _given(**params: object) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in params.items() if value is not None]


# Models and data sets ------------------------------------------------------------------------------------------------


def create_model(request: ModelCreate) -> Call[ModelView]:
    body = request.model_dump(mode="json")
    return Call("POST", "/v1/models", _MODEL, repeatable=False, json=body, timeout_s=_HASHING_S)


def get_model(model: str) -> Call[ModelView]:
    return Call("GET", _path("models", model), _MODEL)


def latest_of(model: str) -> Call[LatestView]:
    return Call("GET", _path("models", model, "latest"), _LATEST)


def page_models(*, cursor: str | None = None, limit: int = 50) -> Call[Page[ModelView]]:
    return Call("GET", "/v1/models", _MODELS, params=_given(cursor=cursor, limit=limit))


def delete_model(model: str) -> Call[None]:
    return Call("DELETE", _path("models", model), _nothing)


def create_data_set(request: DataSetCreate) -> Call[DataSetView]:
    body = request.model_dump(mode="json")
    return Call("POST", "/v1/datasets", _DATA_SET, repeatable=False, json=body, timeout_s=_HASHING_S)


def get_data_set(data_set: str) -> Call[DataSetView]:
    return Call("GET", _path("datasets", data_set), _DATA_SET)


def page_data_sets(*, cursor: str | None = None, limit: int = 50) -> Call[Page[DataSetView]]:
    return Call("GET", "/v1/datasets", _DATA_SETS, params=_given(cursor=cursor, limit=limit))


def delete_data_set(data_set: str) -> Call[None]:
    return Call("DELETE", _path("datasets", data_set), _nothing)


def uploads(kind: str, subject: str) -> Call[list[UploadFile]]:
    """The parts not yet received, with fresh URLs. `kind`: "models" or "datasets"."""
    return Call("GET", _path(kind, subject, "uploads"), _UPLOADS)


def complete(kind: str, subject: str) -> Call[None]:
    return Call("POST", _path(kind, subject, "complete"), _nothing, repeatable=False, timeout_s=_HASHING_S)


def upload_state(kind: str, subject: str) -> Call[str]:
    return Call("GET", _path(kind, subject), lambda response: str(response.json()["state"]))


# Recipes -------------------------------------------------------------------------------------------------------------


def list_recipes() -> Call[list[RecipeView]]:
    return Call("GET", "/v1/recipes", _RECIPES)


def get_recipe(name: str) -> Call[RecipeView]:
    return Call("GET", _path("recipes", name), _RECIPE)


def validate_recipe(recipe: dict[str, Any] | str, model: str | None) -> Call[Plan]:
    body = ValidateRequest(recipe=recipe, model=model).model_dump(mode="json")
    return Call("POST", "/v1/recipes/validate", lambda response: _VALIDATED(response).plan, json=body)


# Jobs ----------------------------------------------------------------------------------------------------------------


def submit_job(request: JobCreate, idempotency_key: str | None) -> Call[JobView]:
    """The key is made here, once a call and not once a try, so that a retry finds the job of the try before it."""
    key = idempotency_key or uuid.uuid4().hex
    body = request.model_dump(mode="json", exclude_unset=True)
    return Call("POST", "/v1/jobs", _JOB, json=body, headers={"Idempotency-Key": key})


def get_job(job_id: str) -> Call[JobView]:
    return Call("GET", _path("jobs", job_id), _JOB)


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
    return Call("GET", "/v1/jobs", _JOBS, params=params + _given(model=model, cursor=cursor, limit=limit))


def cancel_job(job_id: str) -> Call[JobView]:
    return Call("POST", _path("jobs", job_id, "cancel"), _JOB)


def retry_job(job_id: str) -> Call[JobView]:
    return Call("POST", _path("jobs", job_id, "retry"), _JOB, repeatable=False)


def list_events(job_id: str, *, after: int = 0, limit: int = 500) -> Call[list[EventView]]:
    return Call("GET", _path("jobs", job_id, "events"), _EVENTS, params=_given(after=after, limit=limit))


def list_logs(job_id: str, *, after: int = 0, limit: int = 500) -> Call[list[LogView]]:
    return Call("GET", _path("jobs", job_id, "logs"), _LOGS, params=_given(after=after, limit=limit))


def list_artifacts(job_id: str) -> Call[list[ArtifactView]]:
    return Call("GET", _path("jobs", job_id, "artifacts"), _ARTIFACTS)


def get_report(job_id: str) -> Call[ReportView]:
    return Call("GET", _path("jobs", job_id, "report"), _REPORT)


def get_drawn_report(job_id: str, form: str) -> Call[str]:
    """`form`: "html" or "md"."""
    return Call("GET", _path("jobs", job_id, f"report.{form}"), _text)


# Schedules -----------------------------------------------------------------------------------------------------------


def create_schedule(request: ScheduleCreate) -> Call[ScheduleView]:
    """Its name is unique: a repeated request makes no second one, but is refused as a conflict. So it is not repeated."""
    body = request.model_dump(mode="json", exclude_unset=True)
    return Call("POST", "/v1/schedules", _SCHEDULE, repeatable=False, json=body)


def get_schedule(schedule: str) -> Call[ScheduleView]:
    return Call("GET", _path("schedules", schedule), _SCHEDULE)


def page_schedules(*, cursor: str | None = None, limit: int = 50) -> Call[Page[ScheduleView]]:
    return Call("GET", "/v1/schedules", _SCHEDULES, params=_given(cursor=cursor, limit=limit))


def edit_schedule(schedule: str, change: ScheduleUpdate, version: int | None) -> Call[ScheduleView]:
    headers = {"If-Match": f'"v{version}"'} if version is not None else {}
    body = change.model_dump(mode="json", exclude_unset=True)
    # Repeated after a lost answer, an edit of one version would be refused.
    return Call(
        "PATCH", _path("schedules", schedule), _SCHEDULE, repeatable=version is None, json=body, headers=headers
    )


def delete_schedule(schedule: str) -> Call[None]:
    return Call("DELETE", _path("schedules", schedule), _nothing)


def suspend_schedule(schedule: str) -> Call[ScheduleView]:
    return Call("POST", _path("schedules", schedule, "suspend"), _SCHEDULE)


def resume_schedule(schedule: str) -> Call[ScheduleView]:
    return Call("POST", _path("schedules", schedule, "resume"), _SCHEDULE)


def trigger_schedule(schedule: str) -> Call[ScheduleRunView]:
    return Call("POST", _path("schedules", schedule, "trigger"), _RUN, repeatable=False)


def page_schedule_runs(schedule: str, *, cursor: str | None = None, limit: int = 50) -> Call[Page[ScheduleRunView]]:
    return Call("GET", _path("schedules", schedule, "runs"), _RUNS, params=_given(cursor=cursor, limit=limit))


# The service ---------------------------------------------------------------------------------------------------------


def list_workers() -> Call[list[WorkerView]]:
    return Call("GET", "/v1/workers", _WORKERS)


def ready() -> Call[ReadyView]:
    return Call("GET", "/readyz", _READY, accept=frozenset({503}))


def me() -> Call[dict[str, Any]]:
    return Call("GET", "/v1/me", _JSON)
