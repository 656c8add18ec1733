"""Landlock (Linux 5.13 and later): limits the files that a thread and all its descendants may open, and how."""

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nightpress.worker import kernel

# linux/landlock.h; the system calls have these numbers on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_CHANGE = _READ | _WRITE_FILE | _TRUNCATE
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_TCP, _ABSTRACT_SOCKETS_AND_SIGNALS = 0b11, 0b11
#: the first ABI that can limit abstract unix sockets and signals to processes of the same Landlock domain
ABSTRACT_SOCKETS = 6


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


@dataclass(frozen=True)
class Rights:
    """The allowed paths; paths that do not exist are ignored. `tcp`: True leaves TCP as it is, False refuses it."""

    read: Iterable[Path]
    change: Iterable[Path] = field(default=())  #: read and write existing files
    own: Iterable[Path] = field(default=())  #: also create and remove files
    tcp: bool = False


def version() -> int:
    """The kernel's Landlock ABI; 0 if it has no Landlock."""
    try:
        return kernel.system_call(_CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def restrict(rights: Rights) -> None:
    """Limit this thread and all its descendants to these rights. Raises OSError if the kernel refuses."""
    abi = version()
    handled = (1 << 13) - 1 | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
    tcp = _TCP if abi >= 4 and not rights.tcp else 0
    ruleset = _Ruleset(handled, tcp, _ABSTRACT_SOCKETS_AND_SIGNALS if abi >= ABSTRACT_SOCKETS else 0)
    size = 24 if abi >= ABSTRACT_SOCKETS else 16 if abi >= 4 else 8
    ruleset_fd = kernel.system_call(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), 0)
    try:
        for paths, access in ((rights.read, _READ), (rights.change, _CHANGE), (rights.own, handled)):
            for path in paths:
                _allow(ruleset_fd, path, access & handled)
        kernel.process_option(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.system_call(_RESTRICT_SELF, ruleset_fd, 0)
    finally:
        os.close(ruleset_fd)


def _allow(ruleset_fd: int, path: Path, access: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this system
    try:
        rule = _PathBeneath(access if path.is_dir() else access & _FILE_ONLY, parent)
        kernel.system_call(_ADD_RULE, ruleset_fd, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(parent)
