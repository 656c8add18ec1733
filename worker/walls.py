"""The walls around a child: built as far as the kernel, or the container around the worker, allows, and told about. worker/probe.py asks for them."""

import contextlib
import fcntl
import os
import resource
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nightpress.core.handoff.spec import OUT_DIR, WORK_DIR
from nightpress.worker import kernel, landlock, sandbox, seccomp, view

# What the walls keep a child from.
NETWORK: Final = "network"
FILES: Final = "files of others"
METADATA: Final = "modes and times of files"
SOCKETS: Final = "unix sockets"
SHARED_MEMORY: Final = "shared memory of others"
PROCESSES: Final = "command lines of others"
TASKS: Final = "endless processes"
CALLS: Final = "rare system calls"
ALL: Final = (NETWORK, FILES, METADATA, SOCKETS, SHARED_MEMORY, PROCESSES, TASKS, CALLS)

_TASKS_LIMIT = 4096  #: processes and threads of a child; torch on a hundred processors starts some hundreds
#: kernels since which RLIMIT_NPROC counts by user namespace, and the highest process number is a PID namespace's own
_NPROC_BY_NAMESPACE, _PID_MAX_BY_NAMESPACE = (5, 14), (6, 14)
_NAMES: Final = {
    kernel.CLONE_NEWUSER: "user",
    kernel.CLONE_NEWNET: "network",
    kernel.CLONE_NEWNS: "mount",
    kernel.CLONE_NEWPID: "PID",
    kernel.CLONE_NEWIPC: "IPC",
    kernel.CLONE_NEWUTS: "UTS",
}
_PIDS_CGROUP = (Path("/sys/fs/cgroup/pids.max"), Path("/sys/fs/cgroup/pids/pids.max"))


@dataclass(frozen=True)
class Walls:
    """What is not walled off, and why. Empty where all walls stand."""

    down: dict[str, str]

    def __str__(self) -> str:
        standing = ", ".join(what for what in ALL if what not in self.down)
        missing = "; ".join(f"{what} ({why})" for what, why in self.down.items())
        return f"walled off: {standing or 'nothing'}. Not walled off: {missing or 'nothing'}."


@dataclass(frozen=True)
class Namespaces:
    """Those that a process has to itself, and why it has no others."""

    own: int
    refused: dict[int, str]

    def has(self, flag: int) -> bool:
        return bool(self.own & flag)


def leave(*, network: bool) -> Namespaces:
    """Move this single-threaded process to namespaces of its own, as many as the kernel grants. `network`: keep the network."""
    uid, gid = os.geteuid(), os.getegid()
    own = 0
    refused: dict[int, str] = {}
    for flag, name in _NAMES.items():
        if network and flag == kernel.CLONE_NEWNET:
            continue
        try:
            kernel.unshare(flag)
        except OSError as error:
            refused[flag] = refused.get(kernel.CLONE_NEWUSER, f"no {name} namespace: {error.strerror}")
            continue
        own |= flag
        if flag == kernel.CLONE_NEWUSER:
            # Map the owner to itself, so that files keep their owner's name. Refused in some containers: then they have none.
            for file, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with contextlib.suppress(OSError):
                    Path(f"/proc/self/{file}").write_text(line)
    return Namespaces(own, refused)


def build(job_dir: Path, namespaces: Namespaces, *, network: bool) -> Walls:
    """Close this process, and all that it starts, in. It can't be undone."""
    down: dict[str, str] = {}
    own_network = namespaces.has(kernel.CLONE_NEWNET)
    if own_network:
        _raise_loopback()
    else:
        down[NETWORK] = "NIGHTPRESS_SANDBOX_NETWORK is off" if network else namespaces.refused[kernel.CLONE_NEWNET]
    no_view, no_proc = _enter_view(job_dir, namespaces)
    if no_proc:
        down[PROCESSES] = no_proc
    if not _limit_tasks(namespaces, own_proc=not no_proc):
        down[TASKS] = "no limit that is this job's own: set one for the container or the unit"
    with contextlib.suppress(OSError):  # a process without capabilities has none to drop
        kernel.drop_capabilities()
    # Where a job has files and network to itself, so it has its sockets and its shared memory. Elsewhere it must do without
    # both, unless there is a GPU: CUDA and NCCL pass descriptors and tensors that way.
    gpu = bool(view.gpu_devices())
    keep = not no_view or gpu
    abi = landlock.version()
    rights = _rights(
        job_dir, own_files=not no_view, own_proc=not no_proc, shared_memory=keep, tcp=own_network or network
    )
    try:
        landlock.restrict(rights)
    except OSError as error:
        if no_view:
            down[FILES] = down[SHARED_MEMORY] = f"{no_view}; no Landlock: {error.strerror}"
    else:
        if no_view and gpu:
            down[SHARED_MEMORY] = f"{no_view}, and CUDA may need it"
    hidden = not no_view and (own_network or abi >= landlock.ABSTRACT_SOCKETS)
    try:
        seccomp.install(unix_sockets=hidden or gpu, metadata=not no_view)
    except OSError as error:
        why = f"no seccomp: {error.strerror}"
        down[CALLS] = why
        down |= {} if not no_view else {METADATA: f"{no_view}; {why}"}
        down |= {} if hidden else {SOCKETS: f"{no_view or 'the network is kept'}; {why}"}
    else:
        if gpu and not hidden:
            down[SOCKETS] = f"{no_view or 'the network is kept'}, and CUDA may need them"
    return Walls({what: down[what] for what in ALL if what in down})


def _enter_view(job_dir: Path, namespaces: Namespaces) -> tuple[str, str]:
    """Why there is no view of this job's own, and why no /proc; empty where there is."""
    no_proc = namespaces.refused.get(kernel.CLONE_NEWPID, "")
    if not namespaces.has(kernel.CLONE_NEWNS):
        why = namespaces.refused[kernel.CLONE_NEWNS]
        return why, no_proc or why
    # A container hides parts of /proc, and its kernel then lets nobody mount a whole one.
    for own_proc in (False,) if no_proc else (True, False):
        try:
            view.enter(job_dir, own_proc=own_proc, highest_pid=_highest_pid())
        except OSError as error:
            why = f"{error.filename or 'mount'}: {error.strerror}"
            no_proc = no_proc or why
        else:
            os.chdir(job_dir)
            return "", no_proc
    os.chdir(job_dir)
    return why, no_proc


def _rights(job_dir: Path, *, own_files: bool, own_proc: bool, shared_memory: bool, tcp: bool) -> landlock.Rights:
    proc = Path("/proc")
    return landlock.Rights(
        read=[*view.readable(), Path("/sys"), proc, job_dir, *([Path("/dev")] if own_files else [])],
        # CUDA names its threads in /proc, and gives up where it may not.
        change=[*view.devices(), proc if own_proc else proc / "self"],
        own=[
            *(job_dir / folder for folder in (WORK_DIR, OUT_DIR, view.TMP_DIR)),
            *([view.SHARED_MEMORY] if shared_memory else []),
        ],
        tcp=tcp,
    )


def _highest_pid() -> int:
    """What bounds a job's processes and threads by their numbers. 0 where that bound would be the whole machine's."""
    return _TASKS_LIMIT if kernel.release() >= _PID_MAX_BY_NAMESPACE else 0


def _limit_tasks(namespaces: Namespaces, *, own_proc: bool) -> bool:
    """Bound this job's processes and threads. False where only the container or the unit could, and doesn't."""
    if namespaces.has(kernel.CLONE_NEWUSER) and kernel.release() >= _NPROC_BY_NAMESPACE:
        sandbox.lower_limit(resource.RLIMIT_NPROC, _TASKS_LIMIT)
        if os.geteuid() != 0:  # the kernel counts root's, and lets them pass
            return True
    if own_proc and _highest_pid():
        return True
    return any(path.exists() and path.read_text().strip() != "max" for path in _PIDS_CGROUP)


def _raise_loopback() -> None:
    """Let processes of a job talk to each other: a new network namespace has a loopback device that is down."""
    set_flags, up_and_running = 0x8914, 0x41
    with contextlib.suppress(OSError), socket.socket() as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14x", b"lo", up_and_running))
