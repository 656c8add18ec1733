"""The rows of a job's result: artifacts, report, metrics. They are written once, in the transaction in which the job succeeds."""

from dataclasses import asdict

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection

from nightpress.core.ids import new_id
from nightpress.core.service.deliveries.outbox import add_deliveries
from nightpress.core.service.jobs.records import Job, Lease, Succeeded
from nightpress.core.service.promotions.store import promote_accepted
from nightpress.core.service.signing.store import mark_for_signing
from nightpress.core.service.tables.jobs import job_artifacts, job_metrics, job_reports


def write_result(connection: Connection, lease: Lease, outcome: Succeeded) -> None:
    """Insert the result of an attempt."""
    manifest = outcome.manifest
    artifacts = [
        {
            "id": new_id("art"),
            "job_id": lease.job_id,
            "attempt": lease.attempt,
            "format": entry.format,
            "path": entry.path,
            "size": entry.size,
            "digest": entry.digest,
            "consumer": entry.consumer,
            "files": [file.model_dump() for file in entry.files],
        }
        for entry in manifest.artifacts
    ]
    if artifacts:
        connection.execute(insert(job_artifacts), artifacts)
    if outcome.verdict == "accepted":
        mark_for_signing(connection, [str(artifact["id"]) for artifact in artifacts])
    report_files = [file.model_dump() for file in manifest.report]
    connection.execute(insert(job_reports).values(job_id=lease.job_id, report=outcome.report, files=report_files))
    metrics = [
        {"job_id": lease.job_id, "position": position, **asdict(row)} for position, row in enumerate(outcome.metrics)
    ]
    if metrics:
        connection.execute(insert(job_metrics), metrics)


def copy_result(connection: Connection, origin: str, job_id: str, verdict: str) -> None:
    """Copy the rows of another job's result, which has this verdict. The files are not copied: `attempt` and `reused_from` locate them."""
    artifacts = connection.execute(select(job_artifacts).where(job_artifacts.c.job_id == origin)).mappings().all()
    if artifacts:
        rows = [{**row, "id": new_id("art"), "job_id": job_id} for row in artifacts]
        connection.execute(insert(job_artifacts), rows)
        if verdict == "accepted":
            mark_for_signing(connection, [row["id"] for row in rows])
    row = connection.execute(select(job_reports).where(job_reports.c.job_id == origin)).mappings().one()
    report = {**row["report"], "reused_from": origin}
    connection.execute(insert(job_reports).values(job_id=job_id, report=report, files=row["files"]))
    metrics = connection.execute(select(job_metrics).where(job_metrics.c.job_id == origin)).mappings().all()
    if metrics:
        connection.execute(insert(job_metrics), [{**metric, "job_id": job_id} for metric in metrics])


def hand_on(connection: Connection, job: Job) -> None:
    """Deliver an accepted result to its job's destinations, and let its model's name mean it."""
    add_deliveries(connection, job.tenant_id, job.model_name, job.id, job.destinations, key_id=job.created_by)
    if job.promote:
        promote_accepted(connection, job.tenant_id, job.model_name, job.id)
