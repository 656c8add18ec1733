"""The environment variables of consumers' processes."""

import os
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]


def runner_environment(device: Device, threads: int, scratch: Path) -> dict[str, str]:
    """Those of a runner of transformers, and of the process that it is forked from. A process that CUDA runs in can't be forked."""
    # On a GPU, the libraries may look for GPUs while they are imported; through NVML they do it without CUDA.
    chosen = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    return consumer_environment(threads, scratch) | chosen


def consumer_environment(threads: int, scratch: Path) -> dict[str, str]:
    """The environment variables of a consumer's process: this process's without Python settings, and no network or telemetry."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        # OpenMP threads spin at a barrier. If they spin long, they take the processor from a thread that they wait for: on a busy machine,
        # torch became ten times slower. If they don't spin at all, a quiet machine is a third slower. This number avoids both.
        "GOMP_SPINCOUNT": "3000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_MODULES_CACHE": str((scratch / "modules").resolve()),  # where transformers copies a folder's own code
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "TMPDIR": str(scratch.resolve()),
    }
