"""Stores checkpoints and fetches them, so that a retry, another worker, or another job with the same first passes can continue.

Nothing here may fail a job. A checkpoint that can't be stored is skipped, work whose checkpoint can't be fetched is done again, and the
job's log reports both.
"""

import hashlib
import logging
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from nightpress.core.artifacts.storage import ObjectStore, OnBytes
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.checkpoints import pass_folder, pass_record, prefix_digests
from nightpress.core.handoff.frames import Checkpoint
from nightpress.core.handoff.manifest import FileEntry
from nightpress.core.handoff.spec import WORK_DIR
from nightpress.core.recipes.models import Recipe
from nightpress.core.service.jobs.checkpoints import CheckpointIndex, StoredFile, folder_of, key_of
from nightpress.core.service.jobs.records import Job, Lease
from nightpress.core.version import ENGINE

_WAITING = 256  #: most files that wait to be stored; further files are not stored

log = logging.getLogger(__name__)
#: inode, size and modification time: identify the file that was stored or fetched
_Identity = tuple[int, int, int]


class CheckpointDepot:
    """The checkpoints of one attempt. `begin` fetches what earlier attempts stored; `keep` stores the child's files, in its own thread."""

    def __init__(
        self,
        index: CheckpointIndex,
        objects: ObjectStore,
        lease: Lease,
        job: Job,
        recipe: Recipe,
        job_dir: Path,
        *,
        limit: int,
        after_s: float,
        tell: Callable[[str, str], None],
        note: Callable[[str, dict[str, object]], None],
    ) -> None:
        """limit: most bytes that a prefix may have in storage. after_s: seconds from now before anything is stored, except by `close`.

        tell(level, text): writes to the job's log. note(kind, data): adds an event to the job's history.
        """
        self._index, self._objects, self._lease = index, objects, lease
        self._recipe, self._work, self._limit = recipe, job_dir / WORK_DIR, limit
        self._store_from = time.monotonic() + after_s
        self._tell, self._note = tell, note
        self._digests = prefix_digests(
            recipe,
            tenant_id=job.tenant_id,
            model_digest=job.model_digest,
            data={name: str(entry["digest"]) for name, entry in job.data.items()},
            device="cuda" if job.queue == "gpu" else "cpu",
            engine=ENGINE,
        )
        self._mine: set[int] = set()
        self._known: dict[str, _Identity] = {}
        self._waiting: OrderedDict[tuple[int, str], tuple[int, int]] = OrderedDict()  #: (pass, path) → descriptor, step
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    # From storage ----------------------------------------------------------------------------------------------------

    def begin(self, *, on_bytes: OnBytes) -> None:
        """Fetch to work/ the checkpoints of the most advanced attempt with the same first passes. `on_bytes` may raise to stop."""
        if self._limit <= 0:
            return
        try:
            self._mine = {at for at, digest in enumerate(self._digests) if self._index.take(self._lease, digest)}
            *passes, graph = range(len(self._digests))
            self._bring(graph, self._index.files(self._digests[graph]), on_bytes)
            for at in reversed(passes):
                if self._bring_finished(at, on_bytes):
                    break
                self._bring(at, self._index.files(self._digests[at]), on_bytes)
        except NightpressError as error:
            if error.code is not ErrorCode.DATABASE_UNAVAILABLE:
                raise
            self._tell("warning", f"Earlier work was not looked for: {error}")

    def _bring_finished(self, at: int, on_bytes: OnBytes) -> bool:
        """Fetch the output of a finished pass. Returns False if the pass was not finished, or a file of it is missing or damaged."""
        name = self._recipe.passes[at].name
        record, below = pass_record(at, name), f"{pass_folder(at, name)}/"
        files = self._index.files(self._digests[at])
        if record not in files:
            return False
        chosen = {path: file for path, file in files.items() if path.startswith(below)}
        return self._bring(at, chosen, on_bytes) and self._bring(at, {record: files[record]}, on_bytes)

    def _bring(self, at: int, files: dict[str, StoredFile], on_bytes: OnBytes) -> bool:
        """Fetch files. Returns False if one of them is missing or damaged; the others are used."""
        useless = [path for path, file in files.items() if not self._fetch(at, file, on_bytes)]
        if useless:
            self._index.forget(self._digests[at], useless)
        good = [file for path, file in files.items() if path not in useless]
        if good:
            step = max(file.step for file in good)
            makers = sorted({file.job_id for file in good})
            self._note("resumed", {"pass_index": at, "step": step, "files": len(good), "from": makers})
            self._tell("info", f"{self._name(at)} goes on from {len(good)} files made by {', '.join(makers)}.")
        return not useless

    def _fetch(self, at: int, file: StoredFile, on_bytes: OnBytes) -> bool:
        path = self._work / file.path
        if path.exists():
            return True
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._objects.get_file(key_of(self._digests[at], file), path, sha256=file.sha256, on_bytes=on_bytes)
        except NightpressError as error:
            if error.code is ErrorCode.DISK_FULL:
                raise
            self._tell("warning", f"The checkpoint {file.path} can't be used, so its work is done again: {error}")
            return False
        self._known[file.path] = _identity(path.stat())
        return True

    # To storage ------------------------------------------------------------------------------------------------------

    def keep(self, frame: Checkpoint) -> None:
        """Open the file of a checkpoint now and queue it for storing. Returns at once."""
        if frame.pass_index not in self._mine:
            return
        try:
            descriptor = open_plain(self._work, FileEntry(path=frame.path, size=0, sha256="0" * 64).path)
        except (OSError, ValueError) as error:
            self._tell("warning", f"A checkpoint is no file below work/: {error}")
            return
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or self._known.get(frame.path) == _identity(status):
            os.close(descriptor)
            return
        with self._changed:
            replaced = self._waiting.pop((frame.pass_index, frame.path), None)
            if replaced is not None:
                os.close(replaced[0])
            if len(self._waiting) >= _WAITING:
                os.close(descriptor)
                return
            self._waiting[frame.pass_index, frame.path] = descriptor, frame.step
            if self._thread is None:
                self._thread = threading.Thread(target=self._store_all, name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, *, flush_s: float) -> None:
        """Stop. Files that wait are stored first, for at most `flush_s` seconds."""
        until = time.monotonic() + flush_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting, timeout=flush_s)
            for descriptor, _ in self._waiting.values():
                os.close(descriptor)
            self._waiting.clear()
        if self._thread is not None:
            self._thread.join(max(until - time.monotonic(), 0))

    def _store_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=self._store_from - time.monotonic())
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                (at, path), (descriptor, step) = self._waiting.popitem(last=False)
            try:
                self._store(at, path, descriptor, step)
            except (NightpressError, OSError) as error:
                self._mine.discard(at)  # later checkpoints would be useless without this file
                self._tell(
                    "warning", f"The checkpoint {path} was not stored, nor will others of {self._name(at)}: {error}"
                )
            finally:
                os.close(descriptor)
                with self._changed:
                    self._changed.notify_all()

    def _store(self, at: int, path: str, descriptor: int, step: int) -> None:
        if at not in self._mine:
            return
        # Read through the descriptor: the child may replace the file of this name at any time, which must have no effect here.
        held, status = Path(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor)
        with held.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        file = StoredFile(path, status.st_size, sha256, step, self._lease.job_id)
        digest = self._digests[at]
        before = self._index.files(digest)
        if not any(file.sha256 == sha256 for file in before.values()):
            self._objects.put_file(key_of(digest, file), held, sha256=sha256)
        if not self._index.add(self._lease, digest, file, limit=self._limit):
            self._mine.discard(at)
            self._tell(
                "info", f"{self._name(at)} keeps no more checkpoints: they are past their limit, or another attempt's."
            )
            return
        self._known[path] = _identity(status)
        self._note("checkpoint", {"path": path, "step": step, "pass_index": at})
        self._drop_superseded(at, path, before)

    def _drop_superseded(self, at: int, path: str, before: dict[str, StoredFile]) -> None:
        """Delete what this file replaces: its earlier version.

        If the file is the record of a finished pass, also delete all files that were needed only to continue the pass.
        """
        digest, gone = self._digests[at], list[str]()
        if at < len(self._recipe.passes):
            name = self._recipe.passes[at].name
            below = f"{pass_folder(at, name)}/"
            if path == pass_record(at, name):
                gone = [
                    path_before for path_before in before if path_before != path and not path_before.startswith(below)
                ]
        if gone:
            self._index.forget(digest, gone)
        kept = {file.sha256 for file in self._index.files(digest).values()}
        for sha256 in {before[gone_path].sha256 for gone_path in [*gone, path] if gone_path in before} - kept:
            self._objects.delete_prefix(f"{folder_of(digest)}/{sha256}")

    def _name(self, at: int) -> str:
        return f"Pass {at + 1}" if at < len(self._recipe.passes) else "The graph"


def _identity(status: os.stat_result) -> _Identity:
    return status.st_ino, status.st_size, status.st_mtime_ns


def open_plain(root: Path, path: str) -> int:
    """Open a file below `root` without following links, so that a child can't name a file outside its folder."""
    *folders, name = PurePosixPath(path).parts
    at = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for folder in folders:
            below = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
