"""A child's view of the file system: its own root, with the system's libraries, Python, devices and the job's folder."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import nightpress
from nightpress.core.handoff.spec import DATA_DIR, SOURCE_DIR, SPEC_FILE
from nightpress.worker import kernel
from nightpress.worker.kernel import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC, MS_REMOUNT

TMP_DIR = "tmp"
VLLM_PYTHON = "NIGHTPRESS_VLLM_PYTHON"  #: as in core/compress/export/vllm.py; a child is told by its environment
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - processes share semaphores and tensors there
_ETC = ("ld.so.cache", "localtime", "nsswitch.conf", "passwd", "group", "ssl", "OpenCL", "alternatives")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_GPUS = ("nvidia*", "dri", "kfd", "dxg")
#: entries of /proc that belong to the machine; root may write some of them without any capability
_MACHINE = ("sys", "sysrq-trigger", "irq", "bus", "fs", "acpi", "scsi", "asound")


def project() -> Path:
    """The folder that `nightpress` is imported from: a checkout, or site-packages."""
    return Path(nightpress.__file__).resolve().parents[1]


def readable() -> list[Path]:
    """The paths that a child may read: the interpreter, its packages, the system's libraries, and the code that a child runs.

    Of the project only the folders with code, because a data folder may be beside them.
    """
    paths = [Path(path) for path in ("/usr", "/lib", "/lib64", "/bin", "/sbin", sys.base_prefix, sys.prefix)]
    paths += [Path(path) for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    paths += [Path(path) for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path.startswith("/")]
    paths += [Path("/etc") / name for name in _ETC]
    paths += [project() / name for name in ("nightpress", "core", "worker")]
    for python in interpreters()[1:]:  # the environment with vLLM, and the Python that it was made with
        paths += [python.parents[1], python.resolve().parents[1]]
    return [path for path in paths if os.path.exists(path)]  # noqa: PTH110 - Path raises where it may not look


def interpreters() -> list[Path]:
    """The interpreters that run in a child: its own, and that of the environment with vLLM if there is one."""
    named = os.environ.get(VLLM_PYTHON)
    return [Path(sys.executable), *([Path(named)] if named else [])]


def devices() -> list[Path]:
    """The device nodes that a job needs: virtual devices such as /dev/null, and the GPUs."""
    return [path for path in (Path("/dev") / name for name in _DEVICES) if path.exists()] + gpu_devices()


def gpu_devices() -> list[Path]:
    return sorted(path for pattern in _GPUS for path in Path("/dev").glob(pattern))


def enter(job_dir: Path, *, own_proc: bool, highest_pid: int = 0) -> None:
    """Build a new root in this process's own mount namespace, and switch to it.

    Every path keeps its name. Raises OSError if the kernel refuses; the root is then still the old one.
    own_proc: mount a /proc of this process's own PID namespace. highest_pid: limit of the PIDs in it; 0: no limit.
    """
    root = job_dir / TMP_DIR  # any folder will do: it is covered only until the switch
    kernel.mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
    kernel.mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=16m")
    try:
        _fill(root, job_dir, own_proc=own_proc, highest_pid=highest_pid)
        kernel.change_root(root)
    except OSError:
        kernel.unmount(root)
        raise


def _fill(root: Path, job_dir: Path, *, own_proc: bool, highest_pid: int) -> None:
    for path in _outermost(readable()):
        _show(root, path)
    for python in interpreters():
        for link in _links(python):
            _link(root, link)
    _show(root, Path("/sys"))
    _make_dev(root)
    if own_proc:
        _make_proc(root, highest_pid)
    else:
        _bind(Path("/proc"), _below(root, Path("/proc")))
    _show_job(root, job_dir)
    kernel.mount("none", root, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _show_job(root: Path, job_dir: Path) -> None:
    """Show the job's folder, as a single mount so that files can be linked and moved within it. The job's inputs are read-only."""
    seen = _below(root, job_dir)
    _bind(job_dir, seen, recursive=False)
    for name in (SOURCE_DIR, DATA_DIR, SPEC_FILE):
        _bind(seen / name, seen / name)
        kernel.restrict_mount(seen / name, MS_RDONLY)
    temporary = _below(root, Path("/tmp"))  # noqa: S108 - the child's own
    if not temporary.exists():  # otherwise it holds paths that were shown, e.g. the job's folder
        _bind(seen / TMP_DIR, temporary)


def _make_dev(root: Path) -> None:
    for path in devices():
        _bind(path, _below(root, path))
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (root / "dev" / name).symlink_to(f"/proc/self/fd{target}")
    shared = _below(root, SHARED_MEMORY)
    shared.mkdir()
    kernel.mount("none", shared, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")


def _make_proc(root: Path, highest_pid: int) -> None:
    proc = _below(root, Path("/proc"))
    proc.mkdir()
    kernel.mount("none", proc, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if highest_pid:
        (proc / "sys/kernel/pid_max").write_text(str(highest_pid))
    for name in _MACHINE:
        if (proc / name).exists():
            kernel.mount(proc / name, proc / name, "", MS_BIND | MS_REC)
            kernel.restrict_mount(proc / name, MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _show(root: Path, path: Path) -> None:
    """Show `path` read-only, under the same name. A symbolic link, as /lib often is, stays a link."""
    if path.is_symlink():
        _link(root, path)
        path = path.resolve()
    target = _below(root, path)
    if not target.exists():
        _bind(path, target)
        kernel.restrict_mount(target, MS_RDONLY | MS_NOSUID)


def _link(root: Path, link: Path) -> None:
    target = _below(root, link)
    if not target.is_symlink() and not target.exists():
        target.symlink_to(link.readlink())


def _links(path: Path) -> Iterator[Path]:
    """The chain of symbolic links from `path` to its file: the interpreter of a virtual environment is a link."""
    while path.is_symlink():
        yield path
        path = Path(os.path.normpath(path.parent / path.readlink()))


def _bind(source: Path, target: Path, *, recursive: bool = True) -> None:
    if not target.exists():
        if source.is_dir():
            target.mkdir()
        else:
            target.touch()
    kernel.mount(source, target, "", MS_BIND | (MS_REC if recursive else 0))


def _below(root: Path, path: Path) -> Path:
    """The place of an absolute path below the new root. Creates its parent folders."""
    target = root / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _outermost(paths: list[Path]) -> list[Path]:
    """The paths that are not inside another of the paths."""
    return [
        path
        for path in dict.fromkeys(paths)
        if not any(other != path and path.is_relative_to(other) for other in paths)
    ]
