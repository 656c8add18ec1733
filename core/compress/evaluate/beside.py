"""Runs the process of another model beside an artifact's, so that both can be timed by turns."""

from collections.abc import Callable
from pathlib import Path

from nightpress.core.compress.environment import free_gpu_memory
from nightpress.core.compress.export.consumer import Consumer
from nightpress.core.compress.export.consumer_environment import Device
from nightpress.core.compress.export.task import Task

_SPARE = 0.9  #: share of the job's memory limit that may be planned; the rest is for memory that no peak shows


class ConsumerBeside:
    """A context manager that starts a model's consumer when the first artifact is timed, and keeps it for the later artifacts."""

    def __init__(
        self,
        runner: Path,
        folder: Path,
        task: Task,
        peak: int | None,
        *,
        name: str,
        scratch: Path,
        limit: int,
        peak_gpu: int | None = None,
        device: Device = "cpu",
        others: Callable[[], int] = lambda: 0,
        progress: Callable[[float, str], None] = lambda _fraction, _text: None,
    ) -> None:
        """peak, peak_gpu: memory in bytes that the model takes, on the host and on a GPU. None: unknown, or no GPU.

        name: of the model, for errors and files. limit: bytes that the job may use; 0: only the machine's. others: the bytes of further
        processes that run already.
        """
        self._runner, self._folder, self._task, self._peak, self._peak_gpu = runner, folder, task, peak, peak_gpu
        self._name, self._scratch, self._limit, self._device = name, scratch, limit, device
        self._others, self._progress = others, progress
        self._consumer: Consumer | None = None

    def __enter__(self) -> "ConsumerBeside":
        return self

    def __exit__(self, *_: object) -> None:
        if self._consumer is not None:
            self._consumer.__exit__(*_)

    @property
    def held(self) -> int:
        """Bytes that its process takes now; 0 if it was not started."""
        return 0 if self._consumer is None else self._consumer.peak_memory or 0

    def open(self, artifact_peak: int | None) -> Consumer | None:
        """The consumer with the model loaded. None if memory does not hold it beside the artifact's process, or a peak is unknown.

        artifact_peak: peak memory of the artifact's process in bytes; None: unknown.
        """
        if self._consumer is not None:
            return self._consumer
        if not self._fits(artifact_peak):
            return None
        self._consumer = Consumer(
            self._runner,
            self._folder,
            self._task.only_timed,
            name=self._name,
            scratch=self._scratch,
            device=self._device,
            stem=f"{self._name}-beside",
            progress=self._progress,
        )
        self._consumer.run()
        return self._consumer

    def _fits(self, artifact_peak: int | None) -> bool:
        peak = self._peak
        if peak is None or artifact_peak is None:
            return False
        if self._device == "cuda" and (self._peak_gpu or 0) > _SPARE * free_gpu_memory():
            return False
        return room_for(peak, artifact_peak + self._others(), self._limit)


def room_for(peak: int, running: int, limit: int) -> bool:
    """Whether memory holds another process beside those that run, in bytes. limit: bytes that the job may use; 0: only the machine's."""
    available = _kilobytes("/proc/meminfo", "MemAvailable:")
    if available is not None and peak > _SPARE * available:
        return False
    ours = _kilobytes("/proc/self/status", "RssAnon:") or 0
    return not limit or ours + running + peak <= _SPARE * limit


def _kilobytes(file: str, field: str) -> int | None:
    try:
        for line in Path(file).read_text().splitlines():
            if line.startswith(field):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None
