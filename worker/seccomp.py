"""A seccomp filter: refuses system calls that a child does not need, or that no other wall covers.

It is a deny-list: torch, CUDA and the runtimes use too many calls to list them all, and the other walls limit the calls that pass.
"""

import ctypes
import errno
import os
import struct

from nightpress.worker import kernel

_SECCOMP = {"x86_64": 317, "aarch64": 277}
# Without _SPEC_ALLOW, older kernels slow down every thread to protect against Spectre.
_SET_MODE_FILTER, _SPEC_ALLOW = 1, 4
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # first call number of the x32 ABI, whose calls the numbers below would miss

# linux/bpf_common.h and linux/seccomp.h
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24

_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* that clone(2) takes
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_DATAGRAM = 2

#: call → its numbers on x86-64 and aarch64; None if the architecture has no such call
_NUMBERS: dict[str, tuple[int | None, int]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "clone": (56, 220),
    "clone3": (435, 435),
    # A seccomp filter does not see requests in a ring.
    "io_uring_setup": (425, 425),
    # They make memory that no process maps, which only a cgroup counts.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    # All processes of a user share its keyrings.
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "ptrace": (101, 117),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
}
_MISSING = ("io_uring_setup", "memfd_create", "memfd_secret", "shmget", "clone3")
_BY_ARGUMENT = ("socket", "socketpair", "clone")

#: Calls that change a file's metadata, which Landlock does not cover. They are allowed if all files of others are on read-only mounts.
_METADATA: dict[str, tuple[int | None, int]] = {
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "fchown": (93, 55),
    "lchown": (94, -1),
    "fchownat": (260, 54),
    "utime": (132, -1),
    "utimes": (235, -1),
    "futimesat": (261, -1),
    "utimensat": (280, 88),
}
_ATTRIBUTES: dict[str, tuple[int | None, int]] = {
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}


def install(*, unix_sockets: bool, metadata: bool) -> None:
    """Filter the system calls of this thread and all its descendants. Raises OSError if the kernel refuses.

    unix_sockets: whether unix sockets may be made. If not, pairs of stream sockets are still allowed.
    metadata: whether modes, owners, times and extended attributes of files may be changed. If not, changes of the first three do nothing
    and report success, because programs that copy files make them without need.
    """
    machine = os.uname().machine
    if machine not in _ARCHITECTURE:
        raise OSError(errno.ENOSYS, f"no filter for {machine}")
    code = b"".join(_program(machine, unix_sockets=unix_sockets, metadata=metadata))
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held))
    kernel.process_option(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.system_call(_SECCOMP[machine], _SET_MODE_FILTER, _SPEC_ALLOW, program)


def _program(machine: str, *, unix_sockets: bool, metadata: bool) -> list[bytes]:
    column = 0 if machine == "x86_64" else 1

    def on(name: str, verdict: list[bytes]) -> list[bytes]:
        """Instructions that run `verdict` if the call is `name`. `verdict` must end in a return on every path."""
        number = ({**_NUMBERS, **_METADATA, **_ATTRIBUTES}[name])[column]
        return [] if number is None or number < 0 else [_op(_EQUAL, number, 0, len(verdict)), *verdict]

    families = [_INET, _INET6, _NETLINK, *([_UNIX] if unix_sockets else [])]
    program = [_op(_LOAD, _ARCH), _op(_EQUAL, _ARCHITECTURE[machine], 1, 0), _fail(errno.ENOSYS), _op(_LOAD, _NUMBER)]
    if machine == "x86_64":
        program += [_op(_AT_LEAST, _X32, 0, 1), _fail(errno.ENOSYS)]
    for name in _NUMBERS.keys() - set(_BY_ARGUMENT):
        program += on(name, [_fail(errno.ENOSYS if name in _MISSING else errno.EPERM)])
    if not metadata:
        for name in _METADATA:
            program += on(name, [_fail(0)])
        for name in _ATTRIBUTES:
            program += on(name, [_fail(errno.EPERM)])
    program += on(
        "clone", [_op(_LOAD, _ARGUMENT_0), _op(_ANY_BIT, _NEW_NAMESPACES, 0, 1), _fail(errno.EPERM), _allow()]
    )
    allowed = [part for family in families for part in (_op(_EQUAL, family, 0, 1), _allow())]
    program += on("socket", [_op(_LOAD, _ARGUMENT_0), *allowed, _fail(errno.EAFNOSUPPORT)])
    if not unix_sockets:
        # A pair of stream sockets connects only the two. A datagram socket of a pair can still send to any other socket.
        kind = [
            _op(_LOAD, _ARGUMENT_1),
            _op(_AND, 0xF),
            _op(_EQUAL, _DATAGRAM, 0, 1),
            _fail(errno.EAFNOSUPPORT),
            _allow(),
        ]
        program += on("socketpair", kind)
    return [*program, _allow()]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _fail(number: int) -> bytes:
    return _op(_RETURN, _ERRNO | number)


def _allow() -> bytes:
    return _op(_RETURN, _ALLOW)
