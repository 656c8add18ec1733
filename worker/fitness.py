"""Whether this machine can do a job at all. A fault of its own (disk, storage's credentials, Python, GPU) is not the job's.

After a failure that such a fault may have caused, the machine is probed. If it fails its probe, the attempt is not counted, the job goes
to another worker, and this one claims nothing until the probe passes.
"""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings

_ROOM_BYTES = 1024**3  #: that a disk must have free, or a tenth of it where it is small
_PROBE_S = 60.0
_LIBRARIES = "import numpy, safetensors, torch, transformers"
_GPU = "import torch; torch.zeros(1, device='cuda').item()"
_IMPORT_ERRORS = ("ImportError:", "ModuleNotFoundError:")

log = logging.getLogger(__name__)


class MachineFaultError(NightpressError):
    """A fault of this machine that is known without a probe, and that other jobs need not meet: `reason` says what it is."""

    def __init__(self, code: ErrorCode, message: str, *, hint: str, reason: str) -> None:
        super().__init__(code, message, hint=hint)
        self.reason = reason


@dataclass(frozen=True)
class Probe:
    suspects: Callable[[NightpressError], bool]  #: whether a job's failure may be this fault's
    check: Callable[[], str]  #: what is wrong with the machine; empty: nothing


class Fitness:
    """What is wrong with this machine, as far as it is known."""

    def __init__(self, settings: Settings, objects: ObjectStore) -> None:
        folders = [settings.data_dir, *([] if "://" in settings.objects_url else [Path(settings.objects_url)])]
        is_folder = len(folders) > 1
        disk = Probe(lambda error: error.code is ErrorCode.DISK_FULL, lambda: _full(folders))
        storage = Probe(lambda error: error.code is ErrorCode.STORAGE_UNAVAILABLE, lambda: _refused(objects, is_folder))
        self._at_start = (disk, storage)
        self._probes = (
            disk,
            storage,
            Probe(_is_import_error, lambda: _fails("Python lacks a library", _LIBRARIES)),
            *([Probe(_is_crash, lambda: _fails("the GPU does not answer", _GPU))] if settings.worker_queue == "gpu" else []),
        )  # fmt: skip
        self._failing: Probe | None = None
        self.reason = ""  #: why the worker claims nothing; empty: it is fit

    def examine(self) -> str:
        """Probe a machine that nothing is known of yet."""
        return self._probe(*self._at_start)

    def fault_behind(self, error: NightpressError) -> str:
        """What is wrong with the machine, if that may be why a job failed; empty: the failure is the job's."""
        return self._probe(*(probe for probe in self._probes if probe.suspects(error)))

    def look_again(self) -> None:
        """Repeat the probe that failed."""
        if self._failing is not None:
            self._probe(self._failing)

    def _probe(self, *probes: Probe) -> str:
        before = self.reason
        for probe in probes:
            reason = probe.check()
            if reason:
                self._failing, self.reason = probe, reason
                if reason != before:
                    log.error("This worker is unfit and claims nothing: %s.", reason)
                return reason
        if self._failing in probes:
            self._failing, self.reason = None, ""
            log.info("This worker is fit again.")
        return ""


def _full(folders: list[Path]) -> str:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            total, _, free = shutil.disk_usage(folder)
        except OSError as error:
            return f"{folder} can't be used: {error.strerror}"
        if free < min(_ROOM_BYTES, total // 10):
            return f"the disk of {folder} is full: {free / 1e9:.2f} of {total / 1e9:.2f} GB are free"
    return ""


def _refused(objects: ObjectStore, is_folder: bool) -> str:
    """A store that does not answer is away for everybody; one that refuses this machine's credentials or clock is not, nor is a folder."""
    try:
        objects.check()
    except NightpressError as error:
        if is_folder or error.details.get("refused"):
            return error.message.rstrip(".")
    return ""


def _is_import_error(error: NightpressError) -> bool:
    return error.code is ErrorCode.INTERNAL and error.message.startswith(_IMPORT_ERRORS)


def _is_crash(error: NightpressError) -> bool:
    return error.code in {ErrorCode.INTERNAL, ErrorCode.WORKER_LOST}


def _fails(what: str, program: str) -> str:
    """What is wrong if a fresh Python can't run this, as a job's child would."""
    try:
        ran = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=_PROBE_S)
    except subprocess.TimeoutExpired:
        return f"{what}: no answer within {_PROBE_S:g} s"
    if ran.returncode == 0:
        return ""
    said = ran.stderr.strip().splitlines()
    return f"{what}: {said[-1][:300] if said else f'status {ran.returncode}'}"
