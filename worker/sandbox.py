"""What a child may touch: an allow-listed environment, no network, limited resources, and of the file system its own folder.

Several walls, each best effort, so that an older kernel or a container loses some and not all; docs/security.md says what
each stops, and `Walls` says which of them stand:

- environment: an allow-list; no database, broker or storage credentials reach the child, and hubs are offline;
- namespaces (worker/walls.py): a user namespace of its own takes the powers of root, an empty network namespace the network,
  a mount namespace all files but the libraries, the GPUs' devices and the job's folder (worker/view.py), and a PID namespace
  the sight of other processes;
- Landlock (worker/landlock.py): reads the Python installation and the system's libraries, writes its own folder, `source/`
  and `data/` excepted;
- seccomp (worker/seccomp.py): system calls that pass by the other walls;
- rlimits: open files, core dumps, size of a file, number of processes.

There is no RLIMIT_AS or RLIMIT_DATA: torch and CUDA reserve many times the memory they use, so that a limit on addresses
either kills good jobs or stops nothing. The supervisor watches the memory of the child and its descendants instead.
"""

import os
import resource
import shutil
from pathlib import Path

from nightpress.core.handoff.spec import DATA_DIR, OUT_DIR, SOURCE_DIR, SPEC_FILE, WORK_DIR
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
_SPARED_DISK = (
    1024**3
)  #: what no single file of a job may take of the worker's free disk: logs and a database may lie there


def child_environment(job_dir: Path, threads: int) -> dict[str, str]:
    """The whole environment of a child. Threads are set here because torch and its libraries read them when imported."""
    count = str(threads)
    env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return env | {
        "HOME": str(job_dir / TMP_DIR),
        "TMPDIR": str(job_dir / TMP_DIR),
        "USER": "nightpress",  # torch asks for the user's name, who may not exist in the namespace
        "PYTHONPATH": str(view.project()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that CUDA_VISIBLE_DEVICES counts as worker/gpus.py does
        "OMP_NUM_THREADS": count,
        "GOMP_SPINCOUNT": "3000",  # a worker's processors are rarely its own: see core/compress/export/consumer.py
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
    }


def limit_resources() -> None:
    """No core dumps, a bound on open files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lower_limit(resource.RLIMIT_NOFILE, _OPEN_FILES)


def limit_file_size(size: int) -> None:
    """A write past `size` bytes fails with EFBIG. Python ignores SIGXFSZ."""
    lower_limit(resource.RLIMIT_FSIZE, size)


def file_limit(job_dir: Path) -> int:
    """What a single file of a job may have: the free disk, but for what the worker needs to say that it is full."""
    free = shutil.disk_usage(job_dir).free
    return free - min(_SPARED_DISK, free // 10)


def lower_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def hide_memory() -> None:
    """Let no other process of this user read this one's memory and environment, where its credentials stand."""
    kernel.process_option(kernel.PR_SET_DUMPABLE, 0)


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends. Also called between fork and exec."""
    kernel.process_option(kernel.PR_SET_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Have whatever this process's descendants leave behind become its children, so that it can be found and ended."""
    kernel.process_option(kernel.PR_SET_CHILD_SUBREAPER, 1)


def prepare_folder(job_dir: Path) -> None:
    """Make the folder a child will run in, open to its owner alone."""
    job_dir.mkdir(mode=0o700, parents=True)
    for name in (DATA_DIR, OUT_DIR, TMP_DIR, WORK_DIR, SOURCE_DIR):
        (job_dir / name).mkdir(mode=0o700)
    (job_dir / SPEC_FILE).touch(mode=0o600)
