"""Runs the source's process beside an artifact's, so that both can be timed by turns."""

from collections.abc import Callable
from pathlib import Path

from nightpress.core.compress.environment import free_gpu_memory
from nightpress.core.compress.export.consumer import Consumer, Device, Observed
from nightpress.core.compress.export.task import Task

_SPARE = 0.9  #: share of the job's memory limit that may be planned; the rest is for memory that no peak shows


class SourceBeside:
    """A context manager that starts the source's consumer when the first artifact is timed, and keeps it for the later artifacts."""

    def __init__(
        self,
        runner: Path,
        folder: Path,
        task: Task,
        seen: Observed,
        *,
        scratch: Path,
        limit: int,
        device: Device = "cpu",
        progress: Callable[[float, str], None] = lambda _fraction, _text: None,
    ) -> None:
        """seen: the source's results from its own measurement on the device. limit: bytes that the job may use; 0: only the machine's."""
        self._runner, self._folder, self._task, self._seen = runner, folder, task, seen
        self._scratch, self._limit, self._device, self._progress = scratch, limit, device, progress
        self._consumer: Consumer | None = None

    def __enter__(self) -> "SourceBeside":
        return self

    def __exit__(self, *_: object) -> None:
        if self._consumer is not None:
            self._consumer.__exit__(*_)

    def open(self, artifact_peak: int | None) -> Consumer | None:
        """The source's consumer with the model loaded. None if memory does not hold it beside the artifact's process, or a peak is unknown.

        artifact_peak: peak memory of the artifact's process in bytes; None: unknown.
        """
        if self._consumer is not None:
            return self._consumer
        if not self._fits(artifact_peak):
            return None
        shown = self._task.only_timed
        self._consumer = Consumer(
            self._runner,
            self._folder,
            shown,
            name="source",
            scratch=self._scratch,
            device=self._device,
            stem="source-beside",
            progress=self._progress,
        )
        self._consumer.run()
        return self._consumer

    def _fits(self, artifact_peak: int | None) -> bool:
        source_peak = self._seen.peak_memory
        if source_peak is None or artifact_peak is None:
            return False
        if self._device == "cuda" and (self._seen.peak_gpu or 0) > _SPARE * free_gpu_memory():
            return False
        return room_for(source_peak, artifact_peak, self._limit)


def room_for(source_peak: int, artifact_peak: int, limit: int) -> bool:
    """Whether memory holds the source's process beside the artifact's. limit: bytes that the job may use; 0: only the machine's."""
    available = _kilobytes("/proc/meminfo", "MemAvailable:")
    if available is not None and source_peak > _SPARE * available:
        return False
    ours = _kilobytes("/proc/self/status", "RssAnon:") or 0
    return not limit or ours + artifact_peak + source_peak <= _SPARE * limit


def _kilobytes(file: str, field: str) -> int | None:
    try:
        for line in Path(file).read_text().splitlines():
            if line.startswith(field):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None
