"""System calls that Python has no functions for. Each raises OSError if the kernel refuses."""

import ctypes
import os
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

_MOUNT_SETATTR = 442  # recent system calls have the same number on every architecture
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _MountAttributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace"))


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def system_call(number: int, *arguments: object) -> int:
    return _checked(int(_libc.syscall(ctypes.c_long(number), *arguments)), f"system call {number}")


def process_option(option: int, value: int) -> None:
    """Call prctl(2)."""
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def mount(source: Path | str, target: Path, kind: str, flags: int, options: str = "") -> None:
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _checked(result, f"mount {target}")


def unmount(target: Path | str) -> None:
    _checked(_libc.umount2(os.fsencode(target), MNT_DETACH), f"unmount {target}")


def restrict_mount(target: Path, flags: int) -> None:
    """Add MS_RDONLY, MS_NOSUID, MS_NODEV or MS_NOEXEC to a mount and all mounts below it (Linux 5.12)."""
    attributes = _MountAttributes(flags, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    system_call(
        _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_AT_RECURSIVE), ctypes.byref(attributes), size
    )


def change_root(root: Path) -> None:
    """Make `root`, a mount of this namespace, the new root, and detach the old root: pivot_root(2) with "." and "."."""
    os.chdir(root)
    _checked(_libc.syscall(ctypes.c_long(_pivot_root()), b".", b"."), "pivot_root")
    unmount(".")
    os.chdir("/")


def _pivot_root() -> int:
    return 155 if os.uname().machine == "x86_64" else 41


def drop_capabilities() -> None:
    """Give up every capability, for this process and all that it starts."""
    for capability in range(64):
        try:
            process_option(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the kernel knows no further capabilities, or this process may not change the bounding set
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def release() -> tuple[int, int]:
    """The kernel's version, e.g. (6, 14)."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()) or 0)
