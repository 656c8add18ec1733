"""The sandbox of a child: an allow-listed environment, no network, limited resources, and write access only to its own folder.

It consists of several independent walls, each best effort: an older kernel or a container loses some of them, but not all.
docs/security.md describes what each stops, and `Walls` lists which of them work:

- environment: an allow-list; no database, broker or storage credentials reach the child, and hubs are offline;
- namespaces (worker/walls.py): a user namespace removes the powers of root, an empty network namespace removes the network, a mount
  namespace hides all files but the libraries, the GPUs' devices and the job's folder (worker/view.py), and a PID namespace hides other
  processes;
- Landlock (worker/landlock.py): the child may read the Python installation and the system's libraries, and may write its own folder,
  except for `source/` and `data/`;
- seccomp (worker/seccomp.py): refuses system calls that the other walls do not cover;
- rlimits: open files, core dumps, size of a file, number of processes.

There is no RLIMIT_AS or RLIMIT_DATA: torch and CUDA reserve many times the memory that they use, so that a limit on address space would
either kill good jobs or have no effect. The supervisor watches the memory of the child and its descendants instead.
"""

import os
import resource
import shutil
from pathlib import Path

from nightpress.core.handoff.spec import DATA_DIR, MEASURED_DIR, OUT_DIR, SOURCE_DIR, SPEC_FILE, WORK_DIR
from nightpress.worker import kernel, view
from nightpress.worker.view import TMP_DIR

_PASSED_ON = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
)
_OPEN_FILES = 4096
#: bytes of the worker's free disk that no single file of a job may take: logs and a database may be on the same disk
_SPARED_DISK = 1024**3


def child_environment(job_dir: Path, threads: int, vllm_python: Path | None = None) -> dict[str, str]:
    """The complete environment of a child. It sets the number of threads, because torch and its libraries read it when imported.

    vllm_python: the interpreter of the environment with vLLM, which the child may then read; None: there is none.
    """
    count = str(threads)
    env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if vllm_python is not None:
        env[view.VLLM_PYTHON] = str(vllm_python.absolute())
    return (
        env
        | {
            "HOME": str(job_dir / TMP_DIR),
            "TMPDIR": str(job_dir / TMP_DIR),
            "USER": "nightpress",  # torch reads the user's name, and the user may not exist in the namespace
            "PYTHONPATH": str(view.project()),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "HF_MODULES_CACHE": str(
                job_dir / MEASURED_DIR / "modules"
            ),  # read at the import, for who loads models as well
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "ORT_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking for GPUs must not start CUDA before the child has forked what loads models
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that the indices in CUDA_VISIBLE_DEVICES are those of worker/gpus.py
            "OMP_NUM_THREADS": count,
            "GOMP_SPINCOUNT": "3000",  # a worker often shares its processors: see core/compress/export/consumer.py
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
        }
    )


def limit_resources() -> None:
    """Forbid core dumps and limit the number of open files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lower_limit(resource.RLIMIT_NOFILE, _OPEN_FILES)


def limit_file_size(size: int) -> None:
    """Make writes past `size` bytes of a file fail with EFBIG. Python ignores SIGXFSZ."""
    lower_limit(resource.RLIMIT_FSIZE, size)


def file_limit(job_dir: Path) -> int:
    """Most bytes of a single file of a job: the free disk, less a reserve that the worker needs to report a full disk."""
    free = shutil.disk_usage(job_dir).free
    return free - min(_SPARED_DISK, free // 10)


def lower_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def hide_memory() -> None:
    """Forbid other processes of this user to read this process's memory and environment, which hold credentials."""
    kernel.process_option(kernel.PR_SET_DUMPABLE, 0)


def die_with_parent(signal_number: int) -> None:
    """Ask the kernel to send this process a signal when the thread that started it ends. Also called between fork and exec."""
    kernel.process_option(kernel.PR_SET_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Make orphans among this process's descendants its children, so that they can be found and ended."""
    kernel.process_option(kernel.PR_SET_CHILD_SUBREAPER, 1)


def prepare_folder(job_dir: Path) -> None:
    """Create the folder in which a child will run. Only its owner may open it."""
    job_dir.mkdir(mode=0o700, parents=True)
    for name in (DATA_DIR, OUT_DIR, TMP_DIR, WORK_DIR, SOURCE_DIR):
        (job_dir / name).mkdir(mode=0o700)
    (job_dir / SPEC_FILE).touch(mode=0o600)
