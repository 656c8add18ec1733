"""What a child may touch: an allow-listed environment, no network, limited resources, and of the file system its own folder.

Four layers, each best effort and each enough for most of what it guards, so that an older kernel loses one and not all:

- environment: an allow-list; no database, broker or storage credentials reach the child, and hubs are offline;
- namespaces: a user namespace of its own takes the powers of root and the right to read other processes' memory and
  environment, an empty network namespace takes the network;
- Landlock (Linux 5.13 and later): reads the Python installation and the system's libraries, writes its own folder, `source/`
  and `data/` excepted;
- rlimits: open files, core dumps, size of one file.

There is no RLIMIT_AS or RLIMIT_DATA: torch and CUDA reserve many times the memory they use, so that a limit on addresses
either kills good jobs or stops nothing. The supervisor watches the anonymous memory of the child and its descendants instead.
"""

import ctypes
import logging
import os
import resource
import sys
from pathlib import Path

from core.handoff.spec import DATA_DIR, OUT_DIR, SPEC_FILE, WORK_DIR

TMP_DIR = "tmp"
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

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36

# linux/landlock.h; the system calls have these numbers on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def child_environment(job_dir: Path, threads: int) -> dict[str, str]:
    """The whole environment of a child. Threads are set here because torch and its libraries read them when imported."""
    count = str(threads)
    env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return env | {
        "HOME": str(job_dir / TMP_DIR),
        "TMPDIR": str(job_dir / TMP_DIR),
        "USER": "nightpress",  # torch asks for the user's name, who may not exist in the namespace
        "PYTHONPATH": str(_project()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that CUDA_VISIBLE_DEVICES counts as worker/gpus.py does
        "OMP_NUM_THREADS": count,
        "GOMP_SPINCOUNT": "3000",  # a worker's processors are rarely its own: see core/compress/evaluate/consumer.py
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
    }


def leave_network() -> bool:
    """Move this single-threaded process to user and network namespaces of its own. False where the kernel refuses."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        # Map the owner to itself, so that files keep their owner's name. Refused in some containers: then they have none.
        for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            try:
                Path(f"/proc/self/{name}").write_text(line)
            except OSError as error:
                log.debug("%s was not set: %s", name, error)
        return True
    return uid == 0 and _libc.unshare(_CLONE_NEWNET) == 0


def limit_resources() -> None:
    """No core dumps, a bound on open files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)


def limit_file_size(size: int) -> None:
    """A write past `size` bytes fails with EFBIG. Python ignores SIGXFSZ."""
    _lower(resource.RLIMIT_FSIZE, size)


def _lower(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def landlock_version() -> int:
    """The kernel's Landlock ABI; 0 where there is none."""
    return max(int(_libc.syscall(_CREATE_RULESET, None, 0, 1)), 0)


def confine(job_dir: Path) -> bool:
    """Let this thread and all that it starts see only system files and `job_dir`. False where the kernel has no Landlock."""
    version = landlock_version()
    if version == 0:
        return False
    handled = (1 << 13) - 1 | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    ruleset = _Ruleset(handled, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset_fd = int(_libc.syscall(_CREATE_RULESET, ctypes.byref(ruleset), size, 0))
    if ruleset_fd < 0:
        return False
    try:
        for path in _readable():
            _allow(ruleset_fd, path, _READ & handled)
        _allow(ruleset_fd, Path("/dev"), (_READ | _WRITE_FILE | _TRUNCATE) & handled)
        _allow(ruleset_fd, Path("/dev/shm"), handled)  # noqa: S108 - semaphores live there
        # Its own entry alone: CUDA names its threads there, and gives up where it may not.
        _allow(ruleset_fd, Path("/proc/self"), (_READ | _WRITE_FILE | _TRUNCATE) & handled)
        _allow(ruleset_fd, job_dir, _READ & handled)
        for folder in (WORK_DIR, OUT_DIR, TMP_DIR):
            _allow(ruleset_fd, job_dir / folder, handled)
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return int(_libc.syscall(_RESTRICT_SELF, ruleset_fd, 0)) == 0
    finally:
        os.close(ruleset_fd)


def _readable() -> list[Path]:
    """The interpreter, the system's libraries, and of the project only the code a child runs: a data folder may lie beside it."""
    etc = ("ld.so.cache", "localtime", "nsswitch.conf", "passwd", "group", "ssl", "OpenCL", "alternatives")
    paths = [Path(path) for path in (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/bin", "/proc", "/sys")]
    paths += [Path("/etc") / name for name in etc]
    return paths + [_project() / name for name in ("core", "worker")]


def _allow(ruleset_fd: int, path: Path, access: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this system
    try:
        rule = _PathBeneath(access if path.is_dir() else access & _FILE_ONLY, parent)
        _libc.syscall(_ADD_RULE, ruleset_fd, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(parent)


def _project() -> Path:
    return Path(__file__).resolve().parents[1]


def hide_memory() -> None:
    """Let no other process of this user read this one's memory and environment, where its credentials stand."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends. Also called between fork and exec."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def adopt_orphans() -> None:
    """Have whatever this process's descendants leave behind become its children, so that it can be found and ended."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def prepare_folder(job_dir: Path) -> None:
    """Make the folder a child will run in, open to its owner alone."""
    job_dir.mkdir(mode=0o700, parents=True)
    for name in (DATA_DIR, OUT_DIR, TMP_DIR, WORK_DIR, "source"):
        (job_dir / name).mkdir(mode=0o700)
    (job_dir / SPEC_FILE).touch(mode=0o600)
