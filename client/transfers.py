"""Files between a disk and the service: parts up in parallel, ranges down with resume, every byte accounted for by SHA-256.

Plain threads serve both clients: hashing and disk access block, so an event loop would send them to threads all the same.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import httpx

from nightpress.client.errors import ApiError, ClientError, TransferError
from nightpress.client.transport import Attempts, Options, not_reachable
from nightpress.core.handoff.manifest import FileEntry, digest_of
from nightpress.core.wire.jobs import ArtifactView
from nightpress.core.wire.models import FileAnnouncement, FileView, UploadFile, UploadPart, upload_part_size

_CHUNK = 1024 * 1024
_ROUNDS_WITHOUT_PROGRESS = 3
#: More than half a terabyte's parts would not fit into one request: such files are verified whole, at the end.
_MOST_PART_DIGESTS = 8_000


class Meter(Protocol):
    """Watches a transfer, e.g. to draw a bar. Called from several threads."""

    def expect(self, size: int) -> None:
        """So many bytes more will come."""

    def advance(self, size: int) -> None:
        """So many bytes are through; negative when a part has to start over."""


class _Unwatched:
    def expect(self, size: int) -> None: ...

    def advance(self, size: int) -> None: ...


UNWATCHED: Meter = _Unwatched()


class _StoppedError(Exception):
    """The caller gave up; threads leave at their next chunk."""


@dataclass(frozen=True)
class Transfers:
    """The connection and manners of a batch of transfers."""

    http: httpx.Client
    options: Options
    meter: Meter = UNWATCHED
    parallel: int = 4
    stop: threading.Event = field(default_factory=threading.Event)

    # Up ----------------------------------------------------------------------------------------------------------

    def upload(
        self, files: Sequence[UploadFile], sources: Mapping[str, Path], missing: Callable[[], Sequence[UploadFile]]
    ) -> None:
        """Send every part. `missing` asks what the server still lacks, with fresh URLs: they live 15 minutes only.

        Raises what went wrong last, after three rounds in which nothing more arrived.
        """
        left, idle_rounds = list(files), 0
        self.meter.expect(_bytes_in(left))
        while left:
            before = _bytes_in(left)
            error = self._upload_round(left, sources)
            left = list(missing())
            idle_rounds = 0 if _bytes_in(left) < before else idle_rounds + 1
            if left and idle_rounds >= _ROUNDS_WITHOUT_PROGRESS:
                raise error or TransferError(
                    f"The server still lacks parts of {left[0].path} that were sent.", hint="Try again later."
                )

    def _upload_round(self, files: Sequence[UploadFile], sources: Mapping[str, Path]) -> ClientError | None:
        """Send all parts once. Returns the last error that fresh URLs may mend; raises one that they can't."""
        errors: list[ClientError] = []

        def send(file: UploadFile, part: UploadPart) -> None:
            try:
                self._upload_part(self._source_of(sources, file.path), part)
            except ApiError as error:
                # 401 and 403 from a store mean an expired URL; from our own API they mean the key.
                if not self._is_ours(part.url) or error.status >= 500:
                    errors.append(error)
                else:
                    raise

        self._in_threads([(send, (file, part)) for file in files for part in file.parts])
        return errors[-1] if errors else None

    def _source_of(self, sources: Mapping[str, Path], path: str) -> Path:
        if path not in sources:
            raise _is_none(self.options, "a file to send", path)
        return sources[path]

    def _upload_part(self, source: Path, part: UploadPart) -> None:
        attempts = Attempts(self.options, repeatable=True)
        headers = {**(self.options.headers() if self._is_ours(part.url) else {}), **part.headers}
        headers["Content-Length"] = str(part.size)
        while True:
            sent = [0]
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = self.http.put(part.url, content=self._slice(source, part, sent), headers=headers)
                if outcome.is_success:
                    return
            except UnicodeError as error:  # of a header's name or value
                raise _is_none(self.options, "a header", next(iter(part.headers), "")) from error
            except httpx.TransportError as error:
                outcome = error
            self.meter.advance(-sent[0])
            pause = attempts.pause_after(outcome)
            if pause is None:
                raise self._error(outcome)
            self._sleep(pause)

    def _slice(self, source: Path, part: UploadPart, sent: list[int]) -> Iterator[bytes]:
        with source.open("rb") as stream:
            stream.seek(part.offset)
            while sent[0] < part.size:
                self._check()
                chunk = stream.read(min(_CHUNK, part.size - sent[0]))
                if not chunk:
                    raise TransferError(
                        f"{source} became shorter while it was sent.", hint="Send it again when it is whole."
                    )
                yield chunk
                sent[0] += len(chunk)
                self.meter.advance(len(chunk))

    # Down --------------------------------------------------------------------------------------------------------

    def download(self, wanted: Iterable[tuple[str, FileView]], folder: Path) -> None:
        """Fetch each (URL, file) to `folder`/file.path. What is already there and right is kept, what is half there is continued."""
        jobs = [(url, file, target_of(folder, file.path)) for url, file in wanted]
        self.meter.expect(sum(file.size for _, file, _ in jobs))
        self._in_threads([(self._download_file, job) for job in jobs])

    def _download_file(self, url: str, file: FileView, target: Path) -> None:
        if target.is_file() and target.stat().st_size == file.size and self._hash(target).hexdigest() == file.sha256:
            self.meter.advance(file.size)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        for final in (False, True):
            resumed = part.exists()
            if self._fetch(url, file, part) == file.sha256:
                part.replace(target)
                return
            # A stale .part from another file of this name gets one more chance, from nothing.
            part.unlink()
            self.meter.advance(-file.size)
            if final or not resumed:
                break
        raise TransferError(
            f"{file.path} arrived with other bytes than the job recorded (SHA-256 differs).",
            hint="Nothing was kept. Pull again; if it stays so, the stored object is damaged.",
        )

    def _fetch(self, url: str, file: FileView, part: Path) -> str:
        """Bring the .part file to full length and return its SHA-256."""
        attempts = Attempts(self.options, repeatable=True)
        digest = self._hash(part) if part.exists() else hashlib.sha256()
        have = part.stat().st_size if part.exists() else 0
        if have > file.size:
            part.unlink()
            digest, have = hashlib.sha256(), 0
        self.meter.advance(have)
        if file.size == 0:
            part.touch()
        while have < file.size:
            outcome: httpx.Response | httpx.TransportError
            try:
                start = have
                headers = self.options.headers() | {"Accept-Encoding": "identity"}
                headers |= {"Range": f"bytes={have}-"} if have else {}
                with self.http.stream("GET", url, headers=headers) as outcome:
                    if outcome.is_success:
                        if outcome.status_code == 200 and have:  # the server knows no ranges: from the start
                            self.meter.advance(-have)
                            digest, have = hashlib.sha256(), 0
                        with part.open("ab" if have else "wb") as stream:
                            for chunk in outcome.iter_bytes(_CHUNK):
                                self._check()
                                stream.write(chunk)
                                digest.update(chunk)
                                have += len(chunk)
                                self.meter.advance(len(chunk))
                                if have > file.size:
                                    return ""
                            stream.flush()
                            os.fsync(stream.fileno())
                        if have >= file.size:
                            break
                        outcome = httpx.ReadError("the answer ended early")
                    else:
                        outcome.read()
            except httpx.TransportError as error:
                outcome = error
            if have > start:  # a long file over a bad line is fine as long as it grows
                attempts = Attempts(self.options, repeatable=True)
            pause = attempts.pause_after(outcome)
            if pause is None:
                raise self._error(outcome)
            self._sleep(pause)
        return digest.hexdigest()

    def _hash(self, path: Path) -> "hashlib._Hash":
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                self._check()
                digest.update(chunk)
        return digest

    # Common ------------------------------------------------------------------------------------------------------

    def hash_files(self, files: Mapping[str, Path]) -> list[FileAnnouncement]:
        """Size and SHA-256 of each local file and of each part it will be sent in, hashed in parallel."""
        found: dict[str, FileAnnouncement] = {}

        def look(name: str, source: Path) -> None:
            found[name] = self._announce(name, source)

        self._in_threads([(look, item) for item in files.items()])
        announced = [found[name] for name in sorted(found)]
        if sum(len(one.part_sha256) for one in announced) > _MOST_PART_DIGESTS:
            return [one.model_copy(update={"part_sha256": []}) for one in announced]
        return announced

    def _announce(self, name: str, source: Path) -> FileAnnouncement:
        size = source.stat().st_size
        whole, parts = hashlib.sha256(), []
        with source.open("rb") as stream:
            for offset in range(0, size, upload_part_size(size)):
                left, part = min(upload_part_size(size), size - offset), hashlib.sha256()
                while left and (chunk := stream.read(min(_CHUNK, left))):
                    self._check()
                    whole.update(chunk)
                    part.update(chunk)
                    left -= len(chunk)
                parts.append(part.hexdigest())
        return FileAnnouncement(path=name, size=size, sha256=whole.hexdigest(), part_sha256=parts)

    def _in_threads(self, tasks: Sequence[tuple[Callable[..., None], tuple[object, ...]]]) -> None:
        """Run all; at the first error, or when the caller is interrupted, stop the others and raise it."""
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="transfer") as pool:
            futures = [pool.submit(task, *arguments) for task, arguments in tasks]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                errors = [error for one in done if (error := one.exception())]
                # Those who only followed the order to stop have nothing to say about why.
                error = min(errors, key=lambda one: isinstance(one, _StoppedError), default=None)
            except BaseException as interrupt:
                error = interrupt
            if error is not None:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise error

    def _is_ours(self, url: str) -> bool:
        """Whether a URL is the API's own: only those get the key."""
        own = httpx.URL(self.options.api_url)
        try:
            target = own.join(url)
        except httpx.InvalidURL as error:
            raise _is_none(self.options, "an address", url) from error
        return (target.scheme, target.host, target.port) == (own.scheme, own.host, own.port)

    def _error(self, outcome: httpx.Response | httpx.TransportError) -> ClientError:
        if isinstance(outcome, httpx.TransportError):
            return not_reachable(self.options.api_url, outcome)
        return ApiError.from_response(outcome)

    def _check(self) -> None:
        if self.stop.is_set():
            raise _StoppedError

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _StoppedError


def _is_none(options: Options, what: str, text: str) -> TransferError:
    return TransferError(
        f"The server named {what} that is none: {text:.80}.",
        hint=f"Is {options.api_url} a Nightpress API?",
    )


def target_of(folder: Path, path: str) -> Path:
    """Where a file of an artifact goes. Raises TransferError for a name that could leave the folder: the server is not trusted with that."""
    try:
        FileEntry(path=path, size=0, sha256="0" * 64)
    except ValueError as error:
        raise TransferError(
            f"The server names a file {path!r}, which is not a plain relative path.", hint="Nothing was written."
        ) from error
    return folder / path


def url_of(download_url: str, path: str) -> str:
    """A file of an artifact: its path appended, each segment quoted."""
    return download_url.rstrip("/") + "/" + quote(path)


def _bytes_in(files: Iterable[UploadFile]) -> int:
    return sum(part.size for file in files for part in file.parts)


def choose_artifacts(artifacts: Sequence[ArtifactView], formats: Sequence[str], job_id: str) -> list[ArtifactView]:
    """Those of the wanted formats, or all. Raises ClientError for one that isn't there, TransferError for a file list that isn't the artifact's."""
    there = {one.format for one in artifacts}
    if not artifacts:
        raise ClientError(f"Job {job_id} has no artifacts.", hint="Only a job that succeeded has some.")
    if missing := [one for one in formats if one not in there]:
        raise ClientError(f"Job {job_id} has no {', '.join(missing)}.", hint=f"It has: {', '.join(sorted(there))}.")
    chosen = [one for one in artifacts if not formats or one.format in formats]
    for one in chosen:
        for file in one.files:
            target_of(Path(), file.path)
        if (
            digest_of([FileEntry(path=file.path, size=file.size, sha256=file.sha256) for file in one.files])
            != one.digest
        ):
            raise TransferError(
                f"The file list of {one.format} does not add up to its digest.", hint="Nothing was fetched."
            )
    return chosen
