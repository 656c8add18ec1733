"""What is delivered: an artifact's files, its report, its model card and its signed statement."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from sqlalchemy import Engine, select

from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.attestation import REPORT_NAMES
from nightpress.core.handoff.manifest import ATTESTATION_FILE, FileEntry, describe_bytes
from nightpress.core.service.claims import Claim
from nightpress.core.service.signing.store import SigningStore
from nightpress.core.service.tables.jobs import job_artifacts, job_reports, jobs

_CARD = "README.md"


@dataclass(frozen=True)
class Item:
    """One file to deliver."""

    path: str
    size: int
    sha256: str
    #: the bytes [start, end); `end` None: to the end
    read: Callable[[int, int | None], Iterator[bytes]]

    def content(self) -> bytes:
        """All bytes. Only for small files."""
        return b"".join(self.read(0, None))


@dataclass(frozen=True)
class Package:
    """The files to deliver, in the order in which they are sent. The signed statement is the last: it shows that all are there."""

    delivery_id: str
    job_id: str
    model: str
    recipe: str
    artifact: str
    finished_at: str  #: of the job, ISO 8601 in UTC: the same at each attempt
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items)

    @property
    def title(self) -> str:
        return f"{self.model} pressed with {self.recipe}: {self.artifact}"


class Progress:
    """What a sender reports while it works. Its methods raise NightpressError(cancelled) if the delivery was cancelled or taken over."""

    def __init__(self, claim: Claim, resume: dict[str, Any], store: Callable[[Claim, dict[str, Any]], None]) -> None:
        self.claim = claim
        self._resume = resume
        self._store = store
        self._lock = threading.Lock()

    def of(self, path: str) -> dict[str, Any]:
        """What an earlier attempt has kept of a file."""
        found = self._resume.get(path)
        return dict(found) if isinstance(found, dict) else {}

    def keep(self, path: str, state: dict[str, Any]) -> None:
        """Keep something of a file for a later attempt; an empty state forgets it. Threads may call this for different files."""
        with self._lock:
            self._resume = {key: value for key, value in self._resume.items() if key != path} | (
                {path: state} if state else {}
            )
            self._store(self.claim, self._resume)


class Sender(Protocol):
    """Brings a package to one kind of destination."""

    def send(self, package: Package, progress: Progress) -> dict[str, Any]:
        """Deliver everything, and return where it is. Sent again, it changes nothing and returns the same.

        Raises NightpressError: destination_unavailable (try again), destination_refused, cancelled, and those of the storage.
        """

    def close(self) -> None: ...


def pack(
    delivery_id: str, job_id: str, artifact_format: str, *, engine: Engine, objects: ObjectStore, signing: SigningStore
) -> Package:
    """The package of an accepted artifact. Raises NightpressError(not_found) if it was pruned."""
    query = (
        select(job_artifacts, jobs, job_reports.c.files.label("report_files"))
        .join_from(job_artifacts, jobs, jobs.c.id == job_artifacts.c.job_id)
        .join(job_reports, job_reports.c.job_id == jobs.c.id)
        .where(jobs.c.id == job_id, job_artifacts.c.format == artifact_format)
    )
    with transaction(engine, read_only=True) as connection:
        row = connection.execute(query).mappings().one_or_none()
    if row is None or row[jobs.c.artifacts_state] != "kept":
        raise NightpressError(
            ErrorCode.NOT_FOUND, "The artifact was pruned before it was delivered.", hint="Run the job again."
        )
    base = f"jobs/{row[jobs.c.reused_from] or job_id}/attempts/{row[job_artifacts.c.attempt]}"
    files = [FileEntry.model_validate(file) for file in row[job_artifacts.c.files]]
    folder = f"{base}/{row[job_artifacts.c.path]}"
    items = [_stored(objects, f"{folder}/{file.path}", file, file.path) for file in files]
    taken = {file.path for file in files}
    for report in (FileEntry.model_validate(file) for file in row["report_files"]):
        name = _CARD if report.path == "report.md" else report.path
        if report.path in REPORT_NAMES.values() and name not in taken:
            items.append(_stored(objects, f"{base}/{report.path}", report, name))
    bundle = signing.bundle(job_id, artifact_format)
    entry = describe_bytes(ATTESTATION_FILE, bundle)
    items.append(Item(entry.path, entry.size, entry.sha256, lambda start, end: iter((bundle[start:end],))))
    return Package(
        delivery_id=delivery_id,
        job_id=job_id,
        model=row[jobs.c.model_name],
        recipe=str(row[jobs.c.recipe].get("name", "")),
        artifact=artifact_format,
        finished_at=row[jobs.c.finished_at].strftime("%Y-%m-%dT%H:%M:%SZ"),
        items=tuple(items),
    )


def _stored(objects: ObjectStore, key: str, file: FileEntry, path: str) -> Item:
    return Item(path, file.size, file.sha256, partial(objects.read, key))
