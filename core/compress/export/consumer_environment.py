"""The environment variables of consumers' processes."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]

_inherited: Mapping[str, str] = os.environ


@contextlib.contextmanager
def variables_as_now() -> Iterator[None]:
    """In this context, consumers' processes get the variables that this process has at its start.

    Libraries add some of their own while they work: torch sets CUDA_MODULE_LOADING when it first uses a GPU, its compiler
    TORCHINDUCTOR_CACHE_DIR. A consumer's variables must not depend on what this process has done, and a nursery serves only its own.
    """
    global _inherited  # as os.environ, whose copy it is, it belongs to the process
    before = _inherited
    _inherited = dict(os.environ)
    try:
        yield
    finally:
        _inherited = before


def runner_environment(device: Device, threads: int, scratch: Path) -> dict[str, str]:
    """Those of a runner of transformers, and of the process that it is forked from. A process that CUDA runs in can't be forked."""
    return consumer_environment(threads, scratch) | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def consumer_environment(threads: int, scratch: Path) -> dict[str, str]:
    """The environment variables of a consumer's process: this process's without Python settings, and no network or telemetry."""
    kept = {key: value for key, value in _inherited.items() if not key.startswith("PYTHON")}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        # OpenMP threads spin at a barrier. If they spin long, they take the processor from a thread that they wait for: on a busy machine,
        # torch became ten times slower. If they don't spin at all, a quiet machine is a third slower. This number avoids both.
        "GOMP_SPINCOUNT": "3000",
        "TOKENIZERS_PARALLELISM": "false",
        # The libraries may look for GPUs while they are imported; through NVML they do it without CUDA, which could not be used in a fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "HF_MODULES_CACHE": str((scratch / "modules").resolve()),  # where transformers copies a folder's own code
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "TMPDIR": str(scratch.resolve()),
    }
