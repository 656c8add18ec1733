"""The folder of one worker process. It is locked while the process lives, so that the next worker can remove a dead worker's folder."""

import contextlib
import shutil
from pathlib import Path

from filelock import FileLock, Timeout


class WorkerFolder:
    """Creates and locks this worker's folder, `path`. Removes the folders of workers that have ended."""

    def __init__(self, root: Path, worker_id: str) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for other in root.iterdir():
            if other.is_dir():
                with contextlib.suppress(Timeout), FileLock(_lock_of(other), timeout=0):
                    shutil.rmtree(other, ignore_errors=True)
                    _lock_of(other).unlink(missing_ok=True)
        self.path = root / worker_id
        self._lock = FileLock(_lock_of(self.path))
        self._lock.acquire()
        self.path.mkdir(mode=0o700)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        _lock_of(self.path).unlink(missing_ok=True)
        self._lock.release()


def _lock_of(folder: Path) -> Path:
    return folder.with_suffix(".lock")
