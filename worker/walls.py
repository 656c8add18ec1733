"""Builds the walls around a child, as far as the kernel and the worker's container allow, and reports those that are missing.

worker/probe.py uses it to test a machine.
"""

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

# The things that the walls keep a child from.
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
#: first kernels in which RLIMIT_NPROC counts per user namespace, and in which each PID namespace has its own pid_max
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
    """The missing walls: what is not walled off → why. Empty if all walls work."""

    down: dict[str, str]

    def __str__(self) -> str:
        standing = ", ".join(what for what in ALL if what not in self.down)
        missing = "; ".join(f"{what} ({why})" for what, why in self.down.items())
        return f"walled off: {standing or 'nothing'}. Not walled off: {missing or 'nothing'}."


@dataclass(frozen=True)
class Namespaces:
    """The namespaces that a process has for itself (flags), and why the others were refused."""

    own: int
    refused: dict[int, str]

    def has(self, flag: int) -> bool:
        return bool(self.own & flag)


def leave(*, network: bool) -> Namespaces:
    """Move this single-threaded process to its own namespaces, as many as the kernel allows. `network`: keep the network."""
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
            # Map the user to itself, so that files keep their owner. Some containers refuse this; files then have no known owner.
            for file, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with contextlib.suppress(OSError):
                    Path(f"/proc/self/{file}").write_text(line)
    return Namespaces(own, refused)


def build(job_dir: Path, namespaces: Namespaces, *, network: bool) -> Walls:
    """Build the walls around this process and all its descendants. This can't be undone."""
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
    with contextlib.suppress(OSError):  # fails in a process without capabilities, which has none to drop
        kernel.drop_capabilities()
    # A job with its own view of files and its own network may use unix sockets and shared memory: they are its own too.
    # Otherwise both are refused, unless there is a GPU: CUDA and NCCL pass descriptors and tensors that way.
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
    """Enter the job's own view of files. Returns why there is no own view, and why no own /proc; empty if there is."""
    no_proc = namespaces.refused.get(kernel.CLONE_NEWPID, "")
    if not namespaces.has(kernel.CLONE_NEWNS):
        why = namespaces.refused[kernel.CLONE_NEWNS]
        return why, no_proc or why
    # A container hides parts of /proc, and the kernel then refuses to mount a complete one.
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
        # CUDA writes the names of its threads to /proc, and fails if it may not.
        change=[*view.devices(), proc if own_proc else proc / "self"],
        own=[
            *(job_dir / folder for folder in (WORK_DIR, OUT_DIR, view.TMP_DIR)),
            *([view.SHARED_MEMORY] if shared_memory else []),
        ],
        tcp=tcp,
    )


def _highest_pid() -> int:
    """The pid_max for a job's PID namespace, which limits its processes and threads. 0 if pid_max would apply to the whole machine."""
    return _TASKS_LIMIT if kernel.release() >= _PID_MAX_BY_NAMESPACE else 0


def _limit_tasks(namespaces: Namespaces, *, own_proc: bool) -> bool:
    """Limit this job's processes and threads. False if only the container or the unit could set a limit, and does not."""
    if namespaces.has(kernel.CLONE_NEWUSER) and kernel.release() >= _NPROC_BY_NAMESPACE:
        sandbox.lower_limit(resource.RLIMIT_NPROC, _TASKS_LIMIT)
        if os.geteuid() != 0:  # the kernel does not enforce this limit for root
            return True
    if own_proc and _highest_pid():
        return True
    return any(path.exists() and path.read_text().strip() != "max" for path in _PIDS_CGROUP)


def _raise_loopback() -> None:
    """Switch on the loopback device, so that processes of a job can connect to each other. In a new network namespace it is off."""
    set_flags, up_and_running = 0x8914, 0x41
    with contextlib.suppress(OSError), socket.socket() as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14x", b"lo", up_and_running))
