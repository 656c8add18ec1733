"""Reads a job or a study for trackers: parameters, curves, figures, report, and whether its result is promoted."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, Row, select
from sqlalchemy.engine import Connection

from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.database import transaction
from nightpress.core.handoff import curves
from nightpress.core.service.tables.jobs import job_artifacts, job_logs, job_metrics, job_reports, jobs
from nightpress.core.service.tables.promotions import promotions
from nightpress.core.service.tables.studies import studies, study_trials
from nightpress.core.service.trackers.tracker import Point, Run, RunState, Version

_JOB_STATES: dict[str, RunState] = {
    "queued": "waiting",
    "running": "running",
    "cancelling": "running",
    "succeeded": "finished",
    "failed": "failed",
    "cancelled": "cancelled",
}
_STUDY_STATES: dict[str, RunState] = {**_JOB_STATES, "searching": "running", "judging": "running"}
_DEFAULT_TENANT = "default"


class Contents:
    """Makes a Run of a row."""

    def __init__(self, engine: Engine, objects: ObjectStore, objects_url: str) -> None:
        """objects_url: of the installation's storage; artifacts in s3:// are named in the registry of models."""
        self._engine = engine
        self._objects = objects
        self._bucket = objects_url.rstrip("/") if objects_url.startswith("s3://") else None

    def read(self, subject: str, *, after_line: int = 0) -> Run | None:
        """The job or study as it is now, with the points of its curves after a line of its log. None: it was deleted."""
        with transaction(self._engine, read_only=True) as connection:
            job = connection.execute(select(jobs).where(jobs.c.id == subject)).one_or_none()
            if job is not None:
                return self._job(connection, job, after_line)
            study = connection.execute(select(studies).where(studies.c.id == subject)).one_or_none()
            return None if study is None else _study(connection, study)

    def _job(self, connection: Connection, job: Row[Any], after_line: int) -> Run:
        points, lines = _curves(connection, job.id, after_line)
        files: dict[str, str] = {}
        if job.state == "succeeded":
            points += _figures(connection, job)
            files = self._report(connection, job)
        params = {
            "model": job.model_name,
            "model_digest": job.model_digest,
            "recipe": str(job.recipe.get("name", "")),
            "queue": job.queue,
            **flatten({key: value for key, value in job.recipe.items() if key != "name"}),
        }
        tags = {"verdict": job.verdict, "worker": job.worker_id, "reused_from": job.reused_from}
        if job.error:
            tags["error"] = f"{job.error.get('code')}: {job.error.get('message')}"
        labels = {f"label.{key}": value for key, value in job.labels.items()}
        return Run(
            subject=job.id,
            tenant_id=job.tenant_id,
            name=job.name or f"{job.model_name} · {params['recipe']}",
            state=_JOB_STATES[job.state],
            started_at=job.started_at or job.created_at,
            ended_at=job.finished_at,
            params=params,
            tags={key: value for key, value in tags.items() if value} | labels,
            points=tuple(points),
            files=files,
            version=self._version(connection, job),
            parent=job.study_id,
            lines=lines,
        )

    def _report(self, connection: Connection, job: Row[Any]) -> dict[str, str]:
        report = connection.execute(select(job_reports.c.report).where(job_reports.c.job_id == job.id)).scalar_one()
        files = {"report.json": json.dumps(report, indent=2)}
        prefix = _prefix(connection, job)
        for name in ("report.md", "report.html"):
            if self._objects.stat(f"{prefix}/{name}") is not None:
                files[name] = b"".join(self._objects.read(f"{prefix}/{name}")).decode()
        return files

    def _version(self, connection: Connection, job: Row[Any]) -> Version | None:
        named = (promotions.c.tenant_id == job.tenant_id, promotions.c.model_name == job.model_name)
        if connection.execute(select(promotions.c.id).where(*named, promotions.c.job_id == job.id)).first() is None:
            return None
        newest = select(promotions.c.job_id).where(*named)
        newest = newest.order_by(promotions.c.created_at.desc(), promotions.c.id.desc()).limit(1)
        folders = connection.execute(select(job_artifacts.c.path).where(job_artifacts.c.job_id == job.id)).scalars()
        paths = list(folders)
        folder = f"/{paths[0]}" if len(paths) == 1 else ""
        source = f"{self._bucket}/{_prefix(connection, job)}{folder}" if self._bucket and paths else None
        own = job.tenant_id == _DEFAULT_TENANT
        return Version(
            model=job.model_name if own else f"{job.tenant_id}.{job.model_name}",
            source=source,
            description=f"Made by job {job.id}. To fetch it: nightpress pull {job.id}",
            current=connection.execute(newest).scalar_one() == job.id,
        )


def _prefix(connection: Connection, job: Row[Any]) -> str:
    """The prefix of the result's files. A job that reuses a result has the files of the other job."""
    if job.reused_from is None:
        return f"jobs/{job.id}/attempts/{job.attempt}"
    attempt = connection.execute(select(jobs.c.attempt).where(jobs.c.id == job.reused_from)).scalar_one_or_none()
    return f"jobs/{job.reused_from}/attempts/{attempt}"


def _curves(connection: Connection, job_id: str, after: int) -> tuple[list[Point], int]:
    """The points in the log after line `after`, and the number of the last line."""
    columns = job_logs.c
    query = select(columns.seq, columns.at, columns.level, columns.text).where(columns.job_id == job_id)
    points, last = [], after
    for seq, at, level, text in connection.execute(query.where(columns.seq > after).order_by(columns.seq)):
        last = seq
        reading = curves.read_line(text) if level == curves.LEVEL else None
        if reading is not None:
            points.append(Point(reading.name, reading.value, seq if reading.step is None else reading.step, at))
    return points, last


def _figures(connection: Connection, job: Row[Any]) -> list[Point]:
    columns = job_metrics.c
    query = select(columns.subject, columns.name, columns.value, columns.low, columns.high)
    points = []
    for subject, name, value, low, high in connection.execute(
        query.where(columns.job_id == job.id).order_by(columns.position)
    ):
        named = f"{subject}/{name}"
        ends = ((named, value), (f"{named}/low", low), (f"{named}/high", high))
        points += [Point(key, figure, 0, job.finished_at) for key, figure in ends if figure is not None]
    return points


def _study(connection: Connection, study: Row[Any]) -> Run:
    columns = study_trials.c
    query = select(columns.number, columns.goal, columns.margin, columns.state, columns.ended_at)
    ended = query.where(columns.study_id == study.id, columns.role == "search", columns.ended_at.is_not(None))
    points, best = [], None
    for number, goal, margin, state, at in connection.execute(ended.order_by(columns.number)):
        figures = {"goal": goal, "margin": margin}
        if goal is not None and state == "kept":
            best = goal if best is None else min(best, goal)
            figures["best_goal"] = best
        points += [Point(name, value, number, at) for name, value in figures.items() if value is not None]
    limits = {"max_trials": study.max_trials, "parallel": study.parallel, "seed": study.seed}
    asked = {"minimize": study.minimize, "gates": study.gates, "target": study.target, **limits}
    if study.finished_at is not None:
        totals = {"trials": study.told, "cpu_seconds": study.cpu_s, "gpu_seconds": study.gpu_s}
        points += [Point(name, float(value), 0, study.finished_at) for name, value in totals.items()]
    tags = {"verdict": study.verdict, "reason": study.reason}
    return Run(
        subject=study.id,
        tenant_id=study.tenant_id,
        name=study.name or f"{study.model_name} · study",
        state=_STUDY_STATES[study.state],
        started_at=study.created_at,
        ended_at=study.finished_at,
        params={"model": study.model_name, "model_digest": study.model_digest, **flatten(asked)},
        tags={key: value for key, value in tags.items() if value}
        | {f"label.{key}": value for key, value in study.labels.items()},
        points=tuple(points),
        files={} if study.report is None else {"report.json": json.dumps(study.report, indent=2)},
        version=None,
        parent=None,
        lines=0,
    )


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """Every value of nested mappings and lists, under its path: {"passes": [{"bits": 4}]} → {"passes.0.bits": "4"}. None is left out."""
    if isinstance(value, Mapping):
        children: Sequence[tuple[str, Any]] = list(value.items())
    elif isinstance(value, list):
        children = [(str(position), item) for position, item in enumerate(value)]
    else:
        return {} if value is None else {path: value if isinstance(value, str) else json.dumps(value)}
    found: dict[str, str] = {}
    for key, item in children:
        found |= flatten(item, f"{path}.{key}" if path else key)
    return found
