"""The wire: what the HTTP API takes and answers, one model a shape, shared by the API and the client."""

import datetime as dt
import re
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from nightpress.core.recipes.jsonfile import is_text
from nightpress.core.recipes.models import Name
from nightpress.core.recipes.plan import Plan

Item = TypeVar("Item")
JobState = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
TERMINAL_STATES: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
_ONE_LINE = r"^[^\x00-\x1f\x7f]*$"  #: names go into logs, terminals and headers: no line breaks, no escapes
_MAX_S = 366 * 24 * 3600.0
Labels = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]{1,63}$")],
        Annotated[str, Field(max_length=256, pattern=_ONE_LINE)],
    ],
    Field(max_length=32),
]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


_MAX_VALUES = 50_000  #: of one body: a hundred jobs with recipes of their own have a tenth of that
_MAX_DEPTH = 48


def _flaw(raw: object) -> str | None:
    """Why no database would keep it, or nobody would send it. Costs little, whatever is in it."""
    left = _MAX_VALUES
    level = [raw]
    for _ in range(_MAX_DEPTH):
        left -= len(level)
        below: list[object] = []
        for one in level:
            if isinstance(one, str):
                if not is_text(one):
                    return "a NUL character or half a surrogate pair is not allowed"
            elif isinstance(one, dict):
                below += one
                below += one.values()
            elif isinstance(one, list | tuple):
                below += one
            if len(below) > left:
                return f"has more than {_MAX_VALUES} values"
        if not below:
            return None
        level = below
    return "is nested too deeply"


class Request(BaseModel):
    """What a caller sends: unknown fields are an error, never ignored, and `true` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and (why := _flaw(raw)) is not None:
            raise ValueError(why)
        return raw


def _written_as_a_time(raw: object) -> object:
    # pydantic would take 0.5 for half a second past 1970
    if isinstance(raw, dt.datetime) or (isinstance(raw, str) and re.match(r"\d{4}-\d\d-\d\d", raw)):
        return raw
    raise ValueError("must be a time with its zone, such as 2026-11-24T01:00:00Z")


def _near(moment: dt.datetime) -> dt.datetime:
    if not 2000 <= moment.year <= 2200:
        raise ValueError("must lie between the years 2000 and 2200")
    return moment


#: JSON has no time of its own: it comes as text
Moment = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_written_as_a_time), AfterValidator(_near)]


class View(BaseModel):
    """What a caller gets. A client ignores fields it doesn't know, so that a newer server may add some."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Page(View, Generic[Item]):
    items: list[Item]
    next_cursor: str | None = None


class Problem(View):
    """RFC 9457, with our code, what to do, and the request to quote when asking for help."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str = ""
    instance: str = ""
    request_id: str = ""
    errors: list[dict[str, Any]] = []


# Models and data sets ------------------------------------------------------------------------------------------------


def upload_part_size(size: int) -> int:
    """Bytes of every part but the last of a file that is uploaded. Server and clients must agree on it."""
    return max(64 * 1024**2, -(-size // 10_000 // 1024**2) * 1024**2)


class FileAnnouncement(Request):
    """A file that will be uploaded, in parts of `upload_part_size(size)` bytes.

    `part_sha256` lets the server sign each part's content, so that damage is found at the part and not at the end.
    """

    path: str = Field(min_length=1, max_length=512, examples=["model.safetensors"])
    size: int = Field(ge=0)
    sha256: Sha256
    part_sha256: list[Sha256] = Field(default_factory=list, max_length=10_000)


class ModelCreate(Request):
    """Exactly one of `files` (an upload follows), `path` (a folder the operator allowed) and `source` (fetched from there).

    A source is `s3://bucket/folder`, or `hf://organisation/name@revision`, where the revision is a branch, tag or commit.
    """

    name: Name
    files: list[FileAnnouncement] = Field(default_factory=list, max_length=2000)
    path: str | None = Field(None, max_length=4096, examples=["/srv/models/all-minilm-l6-v2"])
    source: str | None = Field(None, min_length=1, max_length=1024, examples=["s3://models/released/minilm"])


class DataSetCreate(Request):
    """One file: `.txt` (prose) or `.jsonl` (rows with `text` and, for classifiers, `label`), plain or `.gz`.

    A source is `s3://bucket/folder/file.jsonl`, or `hf://datasets/organisation/name@revision/folder/file.jsonl`.
    """

    name: Name
    file: FileAnnouncement | None = None
    path: str | None = Field(None, max_length=4096)
    source: str | None = Field(None, min_length=1, max_length=1024, examples=["s3://data/reviews.jsonl.gz"])


class UploadPart(View):
    """One request that the client must make: `PUT url` with exactly `size` bytes from `offset` of the file, and these headers."""

    number: int
    offset: int
    size: int
    url: str
    headers: dict[str, str] = {}


class UploadFile(View):
    path: str
    size: int
    parts: list[UploadPart]  #: those not yet received; URLs live 15 minutes, ask again for fresh ones


class FileView(View):
    path: str
    size: int
    sha256: str


RegistryState = Literal["uploading", "fetching", "verifying", "ready", "failed"]


class ModelView(View):
    """`fetching` and `verifying` go on by themselves, to `ready` or, with an `error`, to `failed`."""

    id: str
    name: str
    state: RegistryState
    digest: str | None
    size: int
    source: Literal["upload", "path", "s3", "hub"]
    source_url: str | None = None
    revision: str | None = None  #: of the source: a commit, or a digest of what its bucket listed
    progress: float | None = None  #: 0 to 1, while it is fetched or verified
    architecture: str | None
    model_type: str | None
    task: str | None
    parameters: int | None
    files: list[FileView]
    error: dict[str, Any] | None = None
    created_at: dt.datetime
    uploads: list[UploadFile] = []  #: only in the answers to create and to GET …/uploads


class DataSetView(View):
    id: str
    name: str
    state: RegistryState
    digest: str | None
    size: int
    source: Literal["upload", "path", "s3", "hub", "builtin"]
    source_url: str | None = None
    revision: str | None = None
    progress: float | None = None
    rows: int | None
    labelled: bool | None
    error: dict[str, Any] | None = None
    created_at: dt.datetime | None
    uploads: list[UploadFile] = []


# Recipes -------------------------------------------------------------------------------------------------------------


class RecipeView(View):
    name: str
    version: int
    description: str
    passes: list[str]
    exports: list[str]
    recipe: dict[str, Any]
    text: str  #: the recipe as it is written, in YAML


class ValidateRequest(Request):
    """A recipe as a mapping or as YAML text, and optionally the model it is meant for."""

    recipe: dict[str, Any] | Annotated[str, Field(max_length=64 * 1024)]
    model: str | None = Field(None, min_length=1, max_length=128)


class ValidateView(View):
    plan: Plan


# Jobs ----------------------------------------------------------------------------------------------------------------


class JobSpec(Request):
    """What to run. `model`: id or name (the newest ready one). `recipe`: a built-in's name, or a mapping."""

    model: str = Field(min_length=1, max_length=128, examples=["all-minilm-l6-v2"])
    recipe: str | dict[str, Any] = Field(examples=["int8-encoder"])
    name: str = Field("", max_length=200, pattern=_ONE_LINE)
    priority: int = Field(0, ge=-100, le=100, description="higher first")
    labels: Labels = {}
    promote: bool = Field(True, description="let an accepted result become the model name's latest")
    queue_limit_s: float | None = Field(None, gt=0, le=_MAX_S, description="fail if not started within")
    run_limit_s: float | None = Field(None, gt=0, le=_MAX_S, description="fail if one attempt runs longer")
    max_failures: int | None = Field(None, ge=1, le=20)
    reuse: bool | None = Field(
        None,
        description="answer at once with the result of an identical job that has succeeded, where there is one; "
        "left out: a schedule's own fires do, other submissions don't",
    )
    force: bool = Field(False, description="run whatever is known already: overrides `reuse`")


class JobCreate(JobSpec):
    """A job, to run now or not before `run_after`."""

    run_after: Moment | None = Field(None, examples=["2026-11-24T01:00:00Z"])


class JobView(View):
    id: str
    name: str
    state: JobState
    verdict: Literal["accepted", "rejected"] | None
    phase: str | None
    progress: float  #: 0 to 1
    pass_index: int | None
    eta_s: float | None
    message: str
    priority: int
    labels: dict[str, str]
    queue: Literal["cpu", "gpu"]
    queue_reason: str = ""  #: why this queue
    notice: str | None = None  #: of a queued job: that no worker could have taken it for an hour, and what to do
    model_id: str
    model_name: str
    recipe: dict[str, Any]
    attempt: int
    failures: int
    max_failures: int
    error: dict[str, Any] | None
    retry_of: str | None
    promote: bool = True
    created_by: str | None = None  #: the key's id
    reused_from: str | None  #: the job whose result this one was given instead of running
    worker_id: str | None
    created_at: dt.datetime
    run_after: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None


class JobBatch(Request):
    """Jobs that are submitted all or none."""

    jobs: list[JobCreate] = Field(min_length=1, max_length=100)


class JobBatchView(View):
    """In the order in which they were asked for."""

    items: list[JobView]


class JobFilter(Request):
    """Which jobs; all that is given must match. Without anything it would mean every job: say `all` for that."""

    state: list[Literal["queued", "running"]] = Field(default_factory=list, max_length=2)
    labels: Labels = {}
    model: str | None = Field(None, min_length=1, max_length=128, description="A model's id or name.")
    queue: Literal["cpu", "gpu"] | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    all: bool = Field(False, description="Mean every job that is not over.")

    @model_validator(mode="after")
    def _says_which(self) -> "JobFilter":
        given = self.model_dump(exclude_defaults=True).keys() - {"all"}
        if bool(given) == self.all:
            raise ValueError("give at least one condition, or `all`, and not both")
        return self


class CancelledView(View):
    """`cancelled`: how many are cancelled or will be in a moment. `more`: there were more than are cancelled in one request."""

    cancelled: int
    more: bool


class EventView(View):
    """One line of a job's history. `seq` has no gaps; it is the SSE id."""

    seq: int
    at: dt.datetime
    kind: str
    data: dict[str, Any]


class LogView(View):
    seq: int
    at: dt.datetime
    attempt: int
    level: str
    text: str


class ArtifactView(View):
    id: str
    format: str
    size: int
    digest: str
    consumer: str
    files: list[FileView]
    download_url: str  #: relative: append the file's path; answers with the bytes or a redirect to a presigned URL


class ReportView(View):
    """report.json beside where its drawn forms are."""

    report: dict[str, Any]
    html_url: str
    markdown_url: str


# Promotions ----------------------------------------------------------------------------------------------------------


class PromotionCreate(Request):
    job_id: str = Field(min_length=1, max_length=40)


class PromotionView(View):
    """Where a model name's pointer stood from `created_at` on."""

    id: str
    model_name: str
    model_id: str
    job_id: str
    recipe: str
    cause: Literal["accepted", "manual"]
    created_by: str | None
    created_at: dt.datetime


class LatestView(View):
    """What a model's name means now, and how to fetch it."""

    promotion: PromotionView
    artifacts: list[ArtifactView]


# Tenants and keys ----------------------------------------------------------------------------------------------------

Bound = Annotated[int | None, Field(ge=0, le=2**53)]
SmallBound = Annotated[int | None, Field(ge=0, le=2**31 - 1)]
TenantId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class QuotaChange(Request):
    """A tenant's own bounds. null: the installation's setting; 0: none."""

    max_queued_jobs: SmallBound = None
    max_running_jobs: SmallBound = None
    max_storage_bytes: Bound = None
    max_gpu_seconds_month: Bound = None
    rate_limit_per_minute: SmallBound = None


class UsageView(View):
    queued_jobs: int
    running_jobs: int
    storage_bytes: int
    gpu_seconds_month: float  #: of attempts that have ended, this calendar month in UTC


class TenantView(View):
    """`own`: what was set for it; `quotas`: what holds; `version` is also the ETag."""

    id: str
    own: QuotaChange
    quotas: dict[str, int]
    usage: UsageView
    version: int


class KeyCreate(Request):
    """`tenant_id` is for administrators; others make keys of their own tenant, with scopes that their own key has."""

    name: str = Field(min_length=1, max_length=200, pattern=_ONE_LINE)
    scopes: list[Annotated[str, Field(max_length=32)]] = Field(min_length=1, max_length=20)
    expires_at: Moment | None = None
    expires_in_s: float | None = Field(
        None,
        gt=0,
        le=100 * 365 * 24 * 3600.0,
        description="Instead of `expires_at`: so long from now, by the service's clock.",
    )
    tenant_id: TenantId | None = None

    @model_validator(mode="after")
    def _one_end(self) -> "KeyCreate":
        if self.expires_at is not None and self.expires_in_s is not None:
            raise ValueError("a key expires at a time or after a time, not both: give `expires_at` or `expires_in_s`")
        return self


class KeyRotate(Request):
    """For how long the old key works beside the new one."""

    overlap_s: float = Field(3600.0, ge=0, le=30 * 24 * 3600.0)


class KeyView(View):
    """A key without its secret."""

    id: str
    tenant_id: str
    name: str
    scopes: list[str]
    created_at: dt.datetime
    expires_at: dt.datetime | None
    expired: bool = False  #: by the database's clock
    revoked_at: dt.datetime | None
    last_used_at: dt.datetime | None
    rotated_from: str | None
    made_by: str | None = Field(description="The key that made it, with which it ends.")


class NewKeyView(View):
    """`key` is shown this once."""

    record: KeyView
    key: str


class AuditView(View):
    """Who did what: a request that may have changed something."""

    id: str
    at: dt.datetime
    tenant_id: str
    key_id: str
    action: str
    subject: str
    status: int
    request_id: str


# Webhooks ------------------------------------------------------------------------------------------------------------

WebhookEvent = Literal["job.succeeded", "job.failed", "job.cancelled"]
WebhookUrl = Annotated[
    str, Field(min_length=8, max_length=2048, pattern=r"^https?://", examples=["https://ci.example.com/hooks"])
]


class WebhookCreate(Request):
    """Where to send what. Messages are signed as standardwebhooks.com has it."""

    url: WebhookUrl
    events: list[WebhookEvent] = Field(min_length=1, max_length=3)


class WebhookUpdate(Request):
    url: WebhookUrl | None = None
    events: list[WebhookEvent] | None = Field(None, min_length=1, max_length=3)
    enabled: bool | None = None


class SecretRotate(Request):
    """For how long messages carry the old secret's signature beside the new one's."""

    overlap_s: float = Field(24 * 3600.0, ge=0, le=30 * 24 * 3600.0)


class WebhookView(View):
    id: str
    url: str
    events: list[WebhookEvent]
    enabled: bool
    disabled_reason: str | None
    version: int
    created_by: str | None
    created_at: dt.datetime


class NewWebhookView(View):
    """`secret` is shown this once."""

    webhook: WebhookView
    secret: str


class AttemptView(View):
    """One try: the receiver's status, or why there was none."""

    number: int
    at: dt.datetime
    status: int | None
    error: str | None
    duration_ms: int


class DeliveryView(View):
    """A message. `id` is its webhook-id at every try; `log` is filled in where one delivery is asked for."""

    id: str
    webhook_id: str
    event: str
    payload: dict[str, Any]
    state: Literal["pending", "delivered", "failed"]
    attempts: int
    next_at: dt.datetime | None
    created_at: dt.datetime
    log: list[AttemptView] = []


# Schedules -----------------------------------------------------------------------------------------------------------

Overlap = Literal["skip", "queue", "replace"]
CatchUp = Literal["none", "latest", "all"]
CronText = Annotated[str, Field(min_length=9, max_length=200, examples=["0 2 * * *"])]
ZoneText = Annotated[str, Field(max_length=64, examples=["Europe/Berlin"])]


class ScheduleCreate(Request):
    """A job to submit again and again.

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
    job: JobSpec
    source: str | None = Field(None, min_length=1, max_length=1024, examples=["s3://models/released/minilm"])
    overlap: Overlap = "skip"
    catch_up: CatchUp = "latest"
    only_if_changed: bool = False
    suspended: bool = False


class ScheduleUpdate(Request):
    """What to change; the rest stays. Edits count `version` up, which is also the ETag.

    `source: null` takes the source away: the schedule then presses what is registered. Null elsewhere changes nothing.
    """

    name: Name | None = None
    cron: CronText | None = None
    timezone: ZoneText | None = None
    job: JobSpec | None = None
    source: str | None = Field(None, min_length=1, max_length=1024)
    overlap: Overlap | None = None
    catch_up: CatchUp | None = None
    only_if_changed: bool | None = None
    suspended: bool | None = None


class ScheduleView(View):
    id: str
    name: str
    cron: str
    timezone: str
    job: JobSpec
    source: str | None = None
    overlap: Overlap
    catch_up: CatchUp
    only_if_changed: bool
    suspended: bool
    version: int
    upcoming: list[dt.datetime]  #: the next fires, in UTC; none while suspended
    created_by: str | None
    created_at: dt.datetime
    updated_at: dt.datetime


class ScheduleRunView(View):
    """One fire and what it came to. `skipped` has a `reason`, `failed` an `error`, `submitted` a job."""

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
    model_id: str | None = None  #: what was fetched for it, where the schedule has a source
    revision: str | None = None  #: of the source
    created_at: dt.datetime


class WorkerView(View):
    id: str
    host: str
    queue: Literal["cpu", "gpu"]
    device: str
    memory: int
    gpu_memory: int | None = None
    gpu_memory_used: int | None = None  #: as of the last beat, by whoever uses it
    threads: int
    version: str
    state: Literal["idle", "busy", "draining", "unfit", "lost"]
    unfit: str | None = Field(None, description="What is wrong with its machine, for which it claims nothing.")
    job_id: str | None
    started_at: dt.datetime
    last_seen_at: dt.datetime


class QueueView(View):
    """What waits and what runs, over all tenants: how long a job of one's own may have to wait."""

    name: Literal["cpu", "gpu"]
    queued: int
    running: int
    oldest_queued_s: float | None  #: age of the oldest job that could run now


class MeView(View):
    """Whose key it is, and what it may do."""

    tenant_id: str
    key_id: str
    scopes: list[str]
    quotas: dict[str, int] = {}  #: 0: no bound
    usage: UsageView | None = None


class ReadyView(View):
    """`ok`, or `degraded` where jobs are accepted but a part they need later doesn't answer."""

    status: Literal["ok", "degraded", "unavailable"]
    checks: dict[str, str]
    version: str
