"""Jobs on the wire: requests, views, histories, logs and artifacts."""

import datetime as dt
from typing import Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from nightpress.core.wire.base import MAX_S, ONE_LINE, Labels, Moment, Request, View
from nightpress.core.wire.costs import CostView
from nightpress.core.wire.deliveries import Destinations
from nightpress.core.wire.models import FileView

JobState = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
TERMINAL_STATES: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


class JobRequest(Request):
    """What to run. `model`: id or name (the newest ready one). `recipe`: a built-in's name, or a mapping."""

    model: str = Field(min_length=1, max_length=128, examples=["all-minilm-l6-v2"])
    recipe: str | dict[str, Any] = Field(examples=["int8-encoder"])
    name: str = Field("", max_length=200, pattern=ONE_LINE)
    priority: int = Field(0, ge=-100, le=100, description="higher first")
    labels: Labels = {}
    promote: bool = Field(True, description="let an accepted result become the model name's latest")
    destinations: Destinations = Field(
        default_factory=list,
        exclude_if=lambda value: not value,  # so that a replica of the earlier version takes what this one stores
        description="addresses that an accepted result is delivered to; {model}, {job} and {artifact} are filled in",
    )
    queue_limit_s: float | None = Field(None, gt=0, le=MAX_S, description="fail if not started within")
    run_limit_s: float | None = Field(None, gt=0, le=MAX_S, description="fail if one attempt runs longer")
    max_failures: int | None = Field(None, ge=1, le=20)
    reuse: bool | None = Field(
        None,
        description="answer at once with the result of an identical job, if one has succeeded; "
        "left out: a schedule's own fires do, other submissions don't",
    )
    force: bool = Field(
        False,
        description="run even if the result is known, and measure the source again even if its figures are: overrides `reuse`",
    )


class JobCreate(JobRequest):
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
    queue_reason: str = ""  #: why this queue, and why so many GPUs
    gpus: int = 0  #: GPUs of one host that it holds while it runs; 0 on the queue `cpu`
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
    destinations: list[str] = []
    created_by: str | None = None  #: the key's id
    study_id: str | None = None  #: the study that it is a trial of
    reused_from: str | None  #: the job whose result this one was given instead of running
    cost: CostView | None = None  #: null where the operator has set no prices
    worker_id: str | None
    created_at: dt.datetime
    run_after: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None


class JobBatch(Request):
    """Jobs that are submitted together: all or none."""

    jobs: list[JobCreate] = Field(min_length=1, max_length=100)


class JobBatchView(View):
    """The jobs in the order of the request."""

    items: list[JobView]


class JobFilter(Request):
    """Selects jobs: every given field must match. To select all jobs, set `all`."""

    state: list[Literal["queued", "running"]] = Field(default_factory=list, max_length=2)
    labels: Labels = {}
    model: str | None = Field(None, min_length=1, max_length=128, description="A model's id or name.")
    queue: Literal["cpu", "gpu"] | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    all: bool = Field(False, description="Select every job that has not ended.")

    @model_validator(mode="after")
    def _says_which(self) -> "JobFilter":
        given = self.model_dump(exclude_defaults=True).keys() - {"all"}
        if bool(given) == self.all:
            raise ValueError("give at least one condition, or `all`, and not both")
        return self


class CancelledView(View):
    """`cancelled`: the number of jobs that are cancelled or about to be. `more`: one request does not cancel all that match."""

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
    signed: bool = False  #: whether GET …/artifacts/{format}/attestation has its signed statement: it was accepted
    download_url: str  #: relative: append the file's path; answers with the bytes or a redirect to a presigned URL


class ReportView(View):
    """report.json, and the addresses of its Markdown and HTML forms."""

    report: dict[str, Any]
    html_url: str
    markdown_url: str
