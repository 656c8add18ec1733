"""A job's artifacts and its report. Both appear in the transaction that ends the job, never before."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from nightpress.api.deps import JobsReader, Services, ServicesDep
from nightpress.api.downloads import send_object
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.routes.jobs import own_job
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.keys import Principal
from nightpress.core.service.jobs.costs import cost_of
from nightpress.core.service.jobs.records import Artifact, Job
from nightpress.core.wire.base import Page
from nightpress.core.wire.costs import JobCostView
from nightpress.core.wire.jobs import ArtifactView, ReportView
from nightpress.core.wire.models import FileView
from nightpress.core.wire.trackers import TrackedView

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["results"])

Unchanged = Annotated[
    bool, Query(description="As it was signed: without the line that names the job whose result this job was given.")
]


@router.get(
    "/artifacts",
    response_model=Page[ArtifactView],
    summary="List a job's artifacts",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def job_artifacts(job_id: str, caller: JobsReader, services: ServicesDep) -> Response:
    job = await own_job(services, caller, job_id)
    found = await services.call(services.resources.store.reader.artifacts, job_id)
    signed = job.verdict == "accepted"
    return answer(Page[ArtifactView](items=[artifact_view(job_id, artifact, signed=signed) for artifact in found]))


@router.get(
    "/artifacts/{format}/files/{path:path}",
    response_class=Response,
    summary="Download a file of an artifact",
    description="The answer is a redirect to a URL that is valid for 15 minutes, or the bytes. Ranges resume a download; the ETag is the file's SHA-256.",
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "The requested range."},
        307: {"description": "The bytes are at `Location`."},
        416: {"description": "The range lies outside the file."},
        **documented(ErrorCode.NOT_FOUND, ErrorCode.STORAGE_UNAVAILABLE),
    },
)
async def artifact_file(
    request: Request,
    job_id: str,
    format: str,  # noqa: A002 - the word in the address
    path: str,
    caller: JobsReader,
    services: ServicesDep,
) -> Response:
    job = await own_job(services, caller, job_id)
    for artifact in await services.call(services.resources.store.reader.artifacts, job_id):
        for file in artifact.files if artifact.format == format else ():
            if file["path"] == path:
                key = f"{attempt_prefix(job, artifact.attempt)}/{artifact.path}/{path}"
                return await send_object(request, services, key, path=path, size=file["size"], sha256=file["sha256"])
    raise NightpressError(
        ErrorCode.NOT_FOUND,
        "The job has no such file.",
        hint="GET …/artifacts lists the files of a succeeded job.",
    )


@router.get(
    "/artifacts/{format}/attestation",
    response_class=Response,
    summary="Get the signed statement of an accepted artifact",
    description="A Sigstore bundle: an in-toto statement of source, recipe, versions, data and measured figures, signed by a key of GET /v1/signing-keys.",
    responses={
        200: {"content": {"application/vnd.dev.sigstore.bundle.v0.3+json": {"schema": {"type": "object"}}}},
        **documented(ErrorCode.NOT_FOUND),
    },
)
async def artifact_attestation(
    job_id: str,
    format: str,  # noqa: A002 - the word in the address
    caller: JobsReader,
    services: ServicesDep,
) -> Response:
    await own_job(services, caller, job_id)
    bundle = await services.call(services.resources.signing.bundle, job_id, format)
    return Response(bundle, media_type="application/vnd.dev.sigstore.bundle.v0.3+json")


@router.get(
    "/trackers",
    response_model=Page[TrackedView],
    summary="List a job's runs in trackers, e.g. MLflow",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def job_trackers(job_id: str, caller: JobsReader, services: ServicesDep) -> Response:
    await own_job(services, caller, job_id)
    return answer(Page[TrackedView](items=await services.call(services.resources.trackers.of, job_id)))


@router.get(
    "/report",
    response_model=ReportView,
    summary="Get a job's report: the figures before and after",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def job_report(job_id: str, caller: JobsReader, services: ServicesDep) -> Response:
    await own_job(services, caller, job_id)
    report = await services.call(services.resources.store.reader.report, job_id)
    if report is None:
        raise _no_report()
    base = f"/v1/jobs/{job_id}/report"
    return answer(ReportView(report=report, html_url=f"{base}.html", markdown_url=f"{base}.md"))


@router.get(
    "/report.json",
    response_class=Response,
    summary="Get report.json as it was signed, byte for byte",
    responses={
        200: {"content": {"application/json": {}}},
        **documented(ErrorCode.NOT_FOUND, ErrorCode.STORAGE_UNAVAILABLE),
    },
)
async def job_report_json(job_id: str, caller: JobsReader, services: ServicesDep) -> Response:
    text, _ = await _drawn(services, caller, job_id, "report.json")
    return Response(text, media_type="application/json")


@router.get(
    "/cost",
    response_model=JobCostView,
    summary="Get what a job has cost, and what its artifacts save per million tokens",
    description="By the operator's prices and the speeds of the job's report. Without prices, `currency` is empty.",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def job_cost(job_id: str, caller: JobsReader, services: ServicesDep) -> Response:
    job = await own_job(services, caller, job_id)
    return answer(await services.call(cost_of, services.resources.costs, services.resources.store.reader, job.id))


@router.get(
    "/report.html",
    response_class=Response,
    summary="Get the report as a self-contained page",
    responses={200: {"content": {"text/html": {}}}, **documented(ErrorCode.NOT_FOUND, ErrorCode.STORAGE_UNAVAILABLE)},
)
async def job_report_html(
    job_id: str, caller: JobsReader, services: ServicesDep, unchanged: Unchanged = False
) -> Response:
    # The page contains names that users chose, so it may not run scripts.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
    drawn, job = await _drawn(services, caller, job_id, "report.html")
    if job.reused_from and not unchanged:
        drawn = drawn.replace(b"<body>", b"<body><p>" + _reused(job).encode() + b"</p>", 1)
    return Response(
        drawn,
        media_type="text/html",
        headers={"Content-Security-Policy": policy},
    )


@router.get(
    "/report.md",
    response_class=Response,
    summary="Get the report as a Markdown model card",
    responses={
        200: {"content": {"text/markdown": {}}},
        **documented(ErrorCode.NOT_FOUND, ErrorCode.STORAGE_UNAVAILABLE),
    },
)
async def job_report_markdown(
    job_id: str, caller: JobsReader, services: ServicesDep, unchanged: Unchanged = False
) -> Response:
    drawn, job = await _drawn(services, caller, job_id, "report.md")
    note = f"\n\n{_reused(job)}\n".encode() if job.reused_from and not unchanged else b""
    return Response(drawn + note, media_type="text/markdown")


def attempt_prefix(job: Job, attempt: int) -> str:
    """The prefix of an attempt's files in object storage. A job that reuses a result has the files of the other job."""
    return f"jobs/{job.reused_from or job.id}/attempts/{attempt}"


def _reused(job: Job) -> str:
    return f"This job, {job.id}, did not run: it has the result of {job.reused_from}, an identical job."


async def _drawn(services: Services, caller: Principal, job_id: str, name: str) -> tuple[bytes, Job]:
    job = await own_job(services, caller, job_id)
    if job.state != "succeeded":
        raise _no_report()
    origin = job
    if job.reused_from:
        found = await services.call(services.resources.store.reader.get, caller.tenant_id, job.reused_from)
        if found is None:
            raise NightpressError(
                ErrorCode.NOT_FOUND,
                f"The report's pages were deleted with the job {job.reused_from}, whose result this job has.",
                hint="GET …/report still has the report's figures.",
            )
        origin = found
    key = f"{attempt_prefix(job, origin.attempt)}/{name}"
    return await services.call(lambda: b"".join(services.resources.objects.read(key))), job


def _no_report() -> NightpressError:
    return NightpressError(
        ErrorCode.NOT_FOUND, "The job has no report.", hint="A job has a report when it has succeeded. See its state."
    )


def artifact_view(job_id: str, artifact: Artifact, *, signed: bool) -> ArtifactView:
    return ArtifactView(
        id=artifact.id,
        format=artifact.format,
        size=artifact.size,
        digest=artifact.digest,
        consumer=artifact.consumer,
        files=[FileView(**file) for file in artifact.files],
        signed=signed,
        download_url=f"/v1/jobs/{job_id}/artifacts/{artifact.format}/files/",
    )
