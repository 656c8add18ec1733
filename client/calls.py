"""The requests of the API as values: method, path, body, and how to read the answer. Nothing is sent here.

Others are in `client.access` (webhooks, keys and tenants), `schedule_calls`, `study_calls` and `delivery_calls`. Both clients send them, and raise ApiError or UnreachableError.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter

from nightpress.core.recipes.passes.named import CHECKED_ELSEWHERE
from nightpress.core.recipes.plan import Plan
from nightpress.core.recipes.possible import Possibility
from nightpress.core.wire.base import Page
from nightpress.core.wire.costs import JobCostView
from nightpress.core.wire.jobs import (
    ArtifactView,
    CancelledView,
    EventView,
    JobBatch,
    JobCreate,
    JobFilter,
    JobView,
    LogView,
    ReportView,
)
from nightpress.core.wire.models import DataSetCreate, DataSetView, ModelCreate, ModelView, UploadFile
from nightpress.core.wire.promotions import LatestView, PromotionCreate, PromotionView
from nightpress.core.wire.recipes import PassView, RecipeView, ValidateRequest, ValidateView
from nightpress.core.wire.system import QueueView, ReadyView, WorkerView
from nightpress.core.wire.trackers import TrackedView

Answer = TypeVar("Answer")
_HASHING_S = 3600.0  #: time for the server to read a model of some terabytes from its disk


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """A request. `repeatable`: sending it twice has the effect of sending it once, so it is sent again after a lost answer.

    Every POST is repeatable, because the server does it once for its Idempotency-Key. An edit of a named version is not.
    """

    method: str
    path: str
    parse: Callable[[httpx.Response], Answer]
    repeatable: bool = True
    params: Sequence[tuple[str, str]] = ()
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    accept: frozenset[int] = frozenset()  #: statuses ≥ 400 that are answers and not errors
    timeout_s: float | None = None  #: set where the server works long before it answers; else Options.timeout_s


def reader(kind: Any) -> Callable[[httpx.Response], Any]:
    """A parser of responses of this type. It raises ValidationError for other content."""
    return lambda response: _adapter(kind).validate_json(response.content, context=CHECKED_ELSEWHERE)


def items_reader(kind: Any) -> Callable[[httpx.Response], Any]:
    """A parser of the items of a page, for lists that fit on a single page."""
    return lambda response: _adapter(Page[kind]).validate_json(response.content).items


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made for the first answer of a type: there are sixty types, and a command gets answers of one or two."""
    return TypeAdapter(kind)


def nothing(_response: httpx.Response) -> None:
    """The parser of an answer without content."""


def plain_text(response: httpx.Response) -> str:
    return response.text


_LATEST, _PROMOTION, _PROMOTIONS = reader(LatestView), reader(PromotionView), reader(Page[PromotionView])
_MODEL, _MODELS = reader(ModelView), reader(Page[ModelView])
_DATA_SET, _DATA_SETS = reader(DataSetView), reader(Page[DataSetView])
_JOB, _JOBS, _JOB_LIST = reader(JobView), reader(Page[JobView]), items_reader(JobView)
_CANCELLED = reader(CancelledView)
_UPLOADS = items_reader(UploadFile)
_PASSES = items_reader(PassView)
_POSSIBLE = items_reader(Possibility)
_RECIPE, _RECIPES = reader(RecipeView), items_reader(RecipeView)
_TRACKED = items_reader(TrackedView)
_ARTIFACTS, _WORKERS, _QUEUES = items_reader(ArtifactView), items_reader(WorkerView), items_reader(QueueView)
_EVENTS, _LOGS = items_reader(EventView), items_reader(LogView)
_REPORT, _READY, _COST = reader(ReportView), reader(ReadyView), reader(JobCostView)
_VALIDATED = reader(ValidateView)
_JSON = reader(dict[str, Any])


def path_of(*parts: str) -> str:
    """The path below /v1, each part quoted."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def query(**params: object) -> list[tuple[str, str]]:
    """Query parameters, without those that are None."""
    return [(name, str(value)) for name, value in params.items() if value is not None]


def if_match(version: int | None) -> dict[str, str]:
    """Optimistic locking: an edit names the version that it is based on. None: the edit is made whatever the version is.

    An edit with this header must not be repeated after a lost answer: it has perhaps made a new version.
    """
    return {"If-Match": f'"v{version}"'} if version is not None else {}


def post(
    path: str,
    parse: Callable[[httpx.Response], Answer],
    body: BaseModel | None = None,
    *,
    key: str | None = None,
    timeout_s: float | None = None,
) -> Call[Answer]:
    """A POST with an Idempotency-Key. All tries of a call carry the same key, so that the server does it once."""
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    json = None if body is None else body.model_dump(mode="json", exclude_unset=True)
    return Call("POST", path, parse, json=json, headers=headers, timeout_s=timeout_s)


# Models and data sets ------------------------------------------------------------------------------------------------


def create_model(request: ModelCreate) -> Call[ModelView]:
    """Announce an upload, register a folder of the server, or have the server fetch a model: as the request says."""
    return post("/v1/models", _MODEL, request, timeout_s=_HASHING_S)


def possible_for_model(model: str) -> Call[list[Possibility]]:
    """Which passes and exports a model can have, and why not the others."""
    return Call("GET", f"{path_of('models', model)}/possible", _POSSIBLE)


def get_model(model: str) -> Call[ModelView]:
    return Call("GET", path_of("models", model), _MODEL)


def latest_of(model: str) -> Call[LatestView]:
    """The result that a model's name means now. Raises ApiError(not_found) where no result was accepted yet."""
    return Call("GET", path_of("models", model, "latest"), _LATEST)


def page_promotions(model: str, *, cursor: str | None = None, limit: int = 50) -> Call[Page[PromotionView]]:
    """A page of the results that a model's name has meant, newest first. The first is the present one."""
    return Call("GET", path_of("models", model, "promotions"), _PROMOTIONS, params=query(cursor=cursor, limit=limit))


def promote(model: str, job_id: str) -> Call[PromotionView]:
    """Let a model's name mean the accepted result of this job, e.g. to go back. The next accepted result replaces it."""
    return post(path_of("models", model, "promotions"), _PROMOTION, PromotionCreate(job_id=job_id))


def page_models(*, cursor: str | None = None, limit: int = 50) -> Call[Page[ModelView]]:
    return Call("GET", "/v1/models", _MODELS, params=query(cursor=cursor, limit=limit))


def delete_model(model: str) -> Call[None]:
    """Delete a model. Jobs done with it keep their results."""
    return Call("DELETE", path_of("models", model), nothing)


def create_data_set(request: DataSetCreate) -> Call[DataSetView]:
    """Announce an upload, register a file of the server, or have the server fetch a data set: as the request says."""
    return post("/v1/datasets", _DATA_SET, request, timeout_s=_HASHING_S)


def get_data_set(data_set: str) -> Call[DataSetView]:
    return Call("GET", path_of("datasets", data_set), _DATA_SET)


def page_data_sets(*, cursor: str | None = None, limit: int = 50) -> Call[Page[DataSetView]]:
    return Call("GET", "/v1/datasets", _DATA_SETS, params=query(cursor=cursor, limit=limit))


def delete_data_set(data_set: str) -> Call[None]:
    return Call("DELETE", path_of("datasets", data_set), nothing)


def uploads(kind: str, subject: str) -> Call[list[UploadFile]]:
    """The parts that the server lacks, with fresh URLs. `kind`: "models" or "datasets"."""
    return Call("GET", path_of(kind, subject, "uploads"), _UPLOADS)


def complete(kind: str, subject: str) -> Call[None]:
    """Close an upload whose parts are all sent. The server verifies it before it answers, or afterwards where it is large."""
    return post(path_of(kind, subject, "complete"), nothing, timeout_s=_HASHING_S)


def upload_state(kind: str, subject: str) -> Call[str]:
    """The state of the model or data set that is uploaded."""
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


def list_passes() -> Call[list[PassView]]:
    """The passes that a recipe may name: the built-in ones, and those of packages that the service allows."""
    return Call("GET", "/v1/recipes/passes", _PASSES)


def recipe_schema() -> Call[dict[str, Any]]:
    """The JSON schema of a recipe. Editors check a recipe against it."""
    return Call("GET", "/v1/recipes/schema", _JSON)


# Jobs ----------------------------------------------------------------------------------------------------------------


def submit_job(
    model: str, recipe: str | dict[str, Any], *, idempotency_key: str | None = None, **fields: Any
) -> Call[JobView]:
    """Queue a job. `fields`: further fields of core.wire.jobs.JobCreate (name, priority, labels, run_after, …).

    Each call has its own Idempotency-Key, so that a retry after a lost answer makes no second job. Give a key of your own
    where a second run of your program must not make a second job either.
    """
    request = JobCreate(model=model, recipe=recipe, **fields)
    return post("/v1/jobs", _JOB, request, key=idempotency_key)


def submit_jobs(jobs: Sequence[JobCreate], *, idempotency_key: str | None = None) -> Call[list[JobView]]:
    """Queue up to 100 jobs: all, or none where one of them is refused."""
    return post("/v1/jobs:batch", _JOB_LIST, JobBatch(jobs=list(jobs)), key=idempotency_key)


def cancel_jobs(wanted: JobFilter) -> Call[CancelledView]:
    """Cancel the jobs that match, up to a number per request. `more` in the answer says whether to ask again."""
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
    """A page of jobs, newest first: in one of these states, with all of these labels, on this model."""
    params = [("state", state) for state in states]
    params += [("label", f"{key}={value}") for key, value in (labels or {}).items()]
    return Call("GET", "/v1/jobs", _JOBS, params=params + query(model=model, cursor=cursor, limit=limit))


def cancel_job(job_id: str) -> Call[JobView]:
    """Cancel a job. A queued job ends at once, a running job within seconds; a finished job stays as it is."""
    return post(path_of("jobs", job_id, "cancel"), _JOB)


def retry_job(job_id: str) -> Call[JobView]:
    """Queue a finished job again, as a new job with a new id."""
    return post(path_of("jobs", job_id, "retry"), _JOB)


def list_events(job_id: str, *, after: int = 0, limit: int = 500) -> Call[list[EventView]]:
    """A job's events from number `after` + 1 on, oldest first."""
    return Call("GET", path_of("jobs", job_id, "events"), _EVENTS, params=query(after=after, limit=limit))


def list_logs(job_id: str, *, after: int = 0, limit: int = 500) -> Call[list[LogView]]:
    """A job's log lines from number `after` + 1 on, oldest first."""
    return Call("GET", path_of("jobs", job_id, "logs"), _LOGS, params=query(after=after, limit=limit))


def list_artifacts(job_id: str) -> Call[list[ArtifactView]]:
    """A job's artifacts with their files; none before the job has succeeded."""
    return Call("GET", path_of("jobs", job_id, "artifacts"), _ARTIFACTS)


def list_job_trackers(job_id: str) -> Call[list[TrackedView]]:
    """A job's runs in trackers, e.g. MLflow; none where the service tells no tracker, or the job waits."""
    return Call("GET", path_of("jobs", job_id, "trackers"), _TRACKED)


def get_report(job_id: str) -> Call[ReportView]:
    """A job's report: the figures before and after, with intervals. Raises ApiError(not_found) before the job has succeeded."""
    return Call("GET", path_of("jobs", job_id, "report"), _REPORT)


def get_cost(job_id: str) -> Call[JobCostView]:
    """What a job has cost, attempt by attempt, and what its artifacts save per million tokens."""
    return Call("GET", path_of("jobs", job_id, "cost"), _COST)


def get_drawn_report(job_id: str, form: Literal["html", "md"]) -> Call[str]:
    """The report as a self-contained HTML page or as a Markdown model card."""
    return Call("GET", path_of("jobs", job_id, f"report.{form}"), plain_text)


# The service ---------------------------------------------------------------------------------------------------------


def list_workers() -> Call[list[WorkerView]]:
    """The workers, with the job of each or the reason why it takes none."""
    return Call("GET", "/v1/workers", _WORKERS)


def list_queues() -> Call[list[QueueView]]:
    """How many jobs wait and run in each queue, over all tenants."""
    return Call("GET", "/v1/queues", _QUEUES)


def ready() -> Call[ReadyView]:
    """Whether the API can reach its database, broker and storage. Needs no key."""
    return Call("GET", "/readyz", _READY, accept=frozenset({503}))
