"""Files between a disk and the service: uploads in parallel parts, downloads that resume, each file checked by its SHA-256.

Both clients use threads here: hashing and disk access block, so that an event loop would need threads as well.
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
from nightpress.client.transport import Options, Retry, not_reachable
from nightpress.core.handoff.manifest import FileEntry, digest_of
from nightpress.core.wire.jobs import ArtifactView
from nightpress.core.wire.models import FileAnnouncement, FileView, UploadFile, UploadPart, upload_part_size

_CHUNK = 1024 * 1024
_ROUNDS_WITHOUT_PROGRESS = 3
#: More digests (half a terabyte of parts) do not fit into a request. Such files are verified as a whole, at the end.
_MOST_PART_DIGESTS = 8_000


class Meter(Protocol):
    """Is told how far a transfer is, e.g. to draw a bar. Called from several threads."""

    def expect(self, size: int) -> None:
        """`size` more bytes will be transferred."""

    def advance(self, size: int) -> None:
        """`size` more bytes have been transferred; negative when a part starts over."""


class _Unwatched:
    """A meter that shows nothing."""

    def expect(self, size: int) -> None: ...

    def advance(self, size: int) -> None: ...


UNWATCHED: Meter = _Unwatched()


class _StoppedError(Exception):
    """Raised in a thread at its next chunk when `Transfers.stop` is set."""


@dataclass(frozen=True)
class Transfers:
    """A batch of transfers over one connection pool. `parallel`: the number of threads. `stop`: set it to end the batch."""

    http: httpx.Client
    options: Options
    meter: Meter = UNWATCHED
    parallel: int = 4
    stop: threading.Event = field(default_factory=threading.Event)

    # Up ----------------------------------------------------------------------------------------------------------

    def upload(
        self, files: Sequence[UploadFile], sources: Mapping[str, Path], missing: Callable[[], Sequence[UploadFile]]
    ) -> None:
        """Send every part of the files. `missing` asks which parts the server lacks, with fresh URLs: they expire after 15 minutes.

        Raises the last ApiError, UnreachableError or TransferError after three rounds in which no further part arrived.
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
        """Send all parts once. Returns the last error that fresh URLs may cure, and raises other errors."""
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
            raise _malformed(self.options, "a file name", path)
        return sources[path]

    def _upload_part(self, source: Path, part: UploadPart) -> None:
        retry = Retry(self.options, repeatable=True)
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
                raise _malformed(self.options, "a header", next(iter(part.headers), "")) from error
            except httpx.TransportError as error:
                outcome = error
            self.meter.advance(-sent[0])
            pause = retry.pause_after(outcome)
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
        """Fetch each (URL, file) to `folder`/file.path. Complete files are kept, partial files are continued.

        Raises TransferError where a file's bytes differ from its SHA-256, ApiError or UnreachableError.
        """
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
            # The .part was perhaps left by another file of this name: try once more from the start.
            part.unlink()
            self.meter.advance(-file.size)
            if final or not resumed:
                break
        raise TransferError(
            f"{file.path} arrived with other bytes than the job recorded (SHA-256 differs).",
            hint="Nothing was kept. Pull again. If the error stays, the stored object is damaged.",
        )

    def _fetch(self, url: str, file: FileView, part: Path) -> str:
        """Bring the .part file to full length and return its SHA-256."""
        retry = Retry(self.options, repeatable=True)
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
                        if outcome.status_code == 200 and have:  # the server ignores ranges: start over
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
            if have > start:  # tries are counted anew as long as the file grows
                retry = Retry(self.options, repeatable=True)
            pause = retry.pause_after(outcome)
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
        """Size and SHA-256 of each local file, and the SHA-256 of each of its parts. Files are hashed in parallel."""
        found: dict[str, FileAnnouncement] = {}

        def announce(name: str, source: Path) -> None:
            found[name] = self._announce(name, source)

        self._in_threads([(announce, item) for item in files.items()])
        announced = [found[name] for name in sorted(found)]
        if sum(len(file.part_sha256) for file in announced) > _MOST_PART_DIGESTS:
            return [file.model_copy(update={"part_sha256": []}) for file in announced]
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
        """Run all tasks. At the first error or interrupt, stop the other tasks and raise it."""
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="transfer") as pool:
            futures = [pool.submit(task, *arguments) for task, arguments in tasks]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                errors = [error for future in done if (error := future.exception())]
                # The reason comes first: threads that were only stopped do not know it.
                error = min(errors, key=lambda error: isinstance(error, _StoppedError), default=None)
            except BaseException as interrupt:
                error = interrupt
            if error is not None:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise error

    def _is_ours(self, url: str) -> bool:
        """Whether a URL leads to the API itself. Only such a URL gets the key."""
        own = httpx.URL(self.options.api_url)
        try:
            target = own.join(url)
        except httpx.InvalidURL as error:
            raise _malformed(self.options, "an address", url) from error
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


def _malformed(options: Options, what: str, text: str) -> TransferError:
    return TransferError(
        f"The server sent {what} that is not valid: {text:.80}.",
        hint=f"Is {options.api_url} a Nightpress API?",
    )


def target_of(folder: Path, path: str) -> Path:
    """The path of an artifact's file below `folder`. Raises TransferError for a name that could leave the folder: the server is not trusted."""
    try:
        FileEntry(path=path, size=0, sha256="0" * 64)
    except ValueError as error:
        raise TransferError(
            f"The server names a file {path!r}, which is not a plain relative path.", hint="Nothing was written."
        ) from error
    return folder / path


def url_of(download_url: str, path: str) -> str:
    """The URL of an artifact's file: the path is appended, each segment quoted."""
    return download_url.rstrip("/") + "/" + quote(path)


def _bytes_in(files: Iterable[UploadFile]) -> int:
    return sum(part.size for file in files for part in file.parts)


def choose_artifacts(artifacts: Sequence[ArtifactView], formats: Sequence[str], job_id: str) -> list[ArtifactView]:
    """The artifacts of the given formats; all where no format is given.

    Raises ClientError for a format that the job lacks, and TransferError for a list of files that differs from the artifact's digest.
    """
    present = {artifact.format for artifact in artifacts}
    if not artifacts:
        raise ClientError(f"Job {job_id} has no artifacts.", hint="Only a job that has succeeded has artifacts.")
    if missing := [form for form in formats if form not in present]:
        raise ClientError(f"Job {job_id} has no {', '.join(missing)}.", hint=f"It has: {', '.join(sorted(present))}.")
    chosen = [artifact for artifact in artifacts if not formats or artifact.format in formats]
    for artifact in chosen:
        for file in artifact.files:
            target_of(Path(), file.path)
        if (
            digest_of([FileEntry(path=file.path, size=file.size, sha256=file.sha256) for file in artifact.files])
            != artifact.digest
        ):
            raise TransferError(
                f"The file list of {artifact.format} does not add up to its digest.", hint="Nothing was fetched."
            )
    return chosen
