"""Checks whether this machine can run jobs. A fault of the machine (disk, storage credentials, Python, GPU) is not a fault of the job.

After a failure that such a fault may have caused, the machine is probed. If it fails the probe, the attempt is not counted as a failure,
the job goes to another worker, and this worker claims no jobs until the probe passes.
"""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.records import OfferedGpu
from nightpress.core.settings import Settings

_ROOM_BYTES = 1024**3  #: free bytes that a disk must have; for a small disk, a tenth of its size
_PROBE_S = 60.0
_LIBRARIES = "import numpy, safetensors, torch, transformers"
_GPUS = "import torch; [torch.zeros(1, device=f'cuda:{at}').item() for at in range({count})]"
_IMPORT_ERRORS = ("ImportError:", "ModuleNotFoundError:")

log = logging.getLogger(__name__)


class MachineFaultError(NightpressError):
    """A fault of this machine that needs no probe and may not affect other jobs. `reason`: a description of the fault."""

    def __init__(self, code: ErrorCode, message: str, *, hint: str, reason: str) -> None:
        super().__init__(code, message, hint=hint)
        self.reason = reason


@dataclass(frozen=True)
class Probe:
    suspects: Callable[[NightpressError], bool]  #: whether this fault may have caused a job's failure
    check: Callable[[], str]  #: describes the machine's fault; empty: it has none


class Fitness:
    """The state of this machine: its known fault, if any."""

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
        )
        self._failing: Probe | None = None
        self.reason = ""  #: the fault for which the worker claims no jobs; empty: the machine is fit

    def examine(self) -> str:
        """Probe the machine at the worker's start. Returns its fault, or an empty text."""
        return self._probe(*self._at_start)

    def fault_behind(self, error: NightpressError, gpus: Sequence[OfferedGpu] = ()) -> str:
        """The machine's fault, if it may have caused a job's failure. Empty: the failure is the job's own. gpus: those that the job had."""
        probes = [*self._probes, *([_gpu_probe(gpus)] if gpus else [])]
        return self._probe(*(probe for probe in probes if probe.suspects(error)))

    def probe_again(self) -> None:
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
    """The storage fault of this machine, or an empty text.

    If a store does not answer, it is down for all workers: this is no fault of this machine. If a store refuses this machine's
    credentials or clock, or a storage folder can't be used, this is a fault of the machine.
    """
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


def _gpu_probe(gpus: Sequence[OfferedGpu]) -> Probe:
    """Probe these GPUs alone: others may be full of the jobs that run on them."""
    uuids = [gpu.uuid for gpu in gpus]
    program = _GPUS.replace("{count}", str(len(gpus)))
    what = (
        f"the GPU {uuids[0]} does not answer"
        if len(gpus) == 1
        else f"one of the GPUs {', '.join(uuids)} does not answer"
    )
    return Probe(_is_crash, lambda: _fails(what, program, CUDA_VISIBLE_DEVICES=",".join(uuids)))


def _fails(what: str, program: str, **env: str) -> str:
    """Run `program` in a new Python process, as a job's child would. Returns the fault, or an empty text if it succeeds."""
    command = [sys.executable, "-P", "-c", program]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, env={**os.environ, **env})
    except subprocess.TimeoutExpired:
        return f"{what}: no answer within {_PROBE_S:g} s"
    if ran.returncode == 0:
        return ""
    said = ran.stderr.strip().splitlines()
    return f"{what}: {said[-1][:300] if said else f'status {ran.returncode}'}"
