"""What `spy` of tests/children.py does from within the sandbox: it tries to reach what lies outside."""

import ctypes
import errno
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def look_around(job_dir: Path, asked: dict[str, Any]) -> dict[str, str]:
    """Try to reach everything outside the sandbox. Returns what came of each attempt: "yes: …" or "no: …".

    `asked`: the supervisor's process id, a port, and the paths of sockets and shared memory to try.
    """
    found: dict[str, str] = {}

    def attempt(name: str, step: Callable[[], object]) -> None:
        try:
            found[name] = f"yes: {step()!r:.80}"
        except OSError as error:
            found[name] = f"no: {errno.errorcode.get(error.errno or 0, error)}"

    supervisor, root = int(asked["supervisor"]), job_dir.parents[2]

    def say(path: str) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(2)
            client.connect(path)
            client.sendall(b"PING\r\n")
            return client.recv(100)

    def start(how_many: int) -> int:
        """Start threads: the kernel counts them as it counts processes, and they cost less."""
        threading.stack_size(64 * 1024)
        enough = threading.Event()
        started = 0
        try:
            for started in range(how_many):  # noqa: B007
                threading.Thread(target=enough.wait, daemon=True).start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, f"after {started}") from error
        finally:
            enough.set()
        return how_many

    attempt("its own environment", lambda: Path("/proc/self/environ").read_bytes())
    attempt("init's environment", lambda: Path("/proc/1/environ").read_bytes())
    attempt("the supervisor's environment", lambda: Path(f"/proc/{supervisor}/environ").read_bytes())
    attempt("the supervisor's memory", lambda: Path(f"/proc/{supervisor}/mem").read_bytes())
    attempt("killing the supervisor", lambda: os.kill(supervisor, 0))
    attempt("the supervisor's name", lambda: Path(f"/proc/{supervisor}/comm").write_text("spy"))
    attempt("the kernel's settings", lambda: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
    attempt("its own threads' names", lambda: Path(f"/proc/self/task/{os.getpid()}/comm").write_text("spy"))
    attempt("the data folder", lambda: sorted(root.iterdir()))
    attempt("the key", lambda: (root / "key").read_text())
    attempt("the database", lambda: (root / "nightpress.db").open("r+b"))
    attempt("another job's folder", lambda: sorted(job_dir.parent.iterdir()))
    attempt("the cache", lambda: sorted((root / "cache" / "blobs").iterdir()))
    attempt("writing the source", lambda: next((job_dir / "source").iterdir()).open("ab"))
    attempt("a home folder", lambda: sorted(Path("/root").iterdir()))
    attempt("writing beside", lambda: (job_dir / "elsewhere").write_text("x"))
    attempt("writing /tmp", lambda: Path("/tmp/nightpress-spy").write_text("x"))
    attempt("the network", lambda: socket.create_connection(("127.0.0.1", asked["port"]), timeout=2))
    source = next((job_dir / "source").iterdir())
    attempt("the broker's socket", lambda: say(asked["broker"]))
    attempt("a socket without a path", lambda: say("\0nightpress-spy"))
    attempt("a virtual machine's socket", lambda: socket.socket(socket.AF_VSOCK))
    attempt("half a pair of datagrams", lambda: _datagram(asked["bystander"]))
    attempt("the key's mode", lambda: (root / "key").chmod(0o666))
    attempt("the database's times", lambda: os.utime(root / "nightpress.db", (0, 0)))
    attempt("the key's attributes", lambda: os.setxattr(root / "key", "user.x", b"y"))
    attempt("the cached model's mode", lambda: source.chmod(0))
    attempt("another job's shared memory", lambda: Path(asked["shared"]).read_bytes())
    attempt("leaving shared memory", lambda: Path(asked["left"]).write_text("left"))
    attempt("memory without a file", lambda: os.memfd_create("spy"))
    attempt("another's command line", lambda: _command_line_of("nightpress" + "-neighbour"))
    attempt("a namespace of its own", lambda: _unshare(0x10000000))
    attempt("the user's keyring", lambda: _system_call(219 if os.uname().machine == "aarch64" else 250, 0, -4, 0))
    attempt("a socket of its own", _talk_to_itself)
    attempt("shared memory of its own", lambda: _share_memory())
    attempt("a program of the system", lambda: subprocess.run(["true"], check=True))
    attempt("linking work into its result", lambda: _link(job_dir))
    attempt("writing its folder", lambda: (job_dir / "work" / "x").write_text("x"))
    attempt("a temporary file", lambda: (Path(os.environ["TMPDIR"]) / "x").write_text("x"))
    attempt("ten thousand threads", lambda: start(10_000))  # last: the kernel takes a while to end them
    status = Path("/proc/self/limits").read_text()
    found["environment"] = json.dumps(dict(os.environ))
    found["open files"] = next(line for line in status.splitlines() if line.startswith("Max open files"))
    found["core"] = next(line for line in status.splitlines() if line.startswith("Max core"))
    return found


def _system_call(number: int, *arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def _unshare(flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return flags


def _datagram(path: str) -> int:
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with mine, other:
        return mine.sendto(b"hi", path)


def _command_line_of(name: str) -> str:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if name in path.read_text():
            return str(path)
    raise FileNotFoundError(errno.ENOENT, name)


def _talk_to_itself() -> bytes:
    """Connect as the CUDA and NCCL processes of a job do: over an abstract socket (without a path), and over TCP on loopback."""
    for family, address in ((socket.AF_UNIX, "\0nightpress-own"), (socket.AF_INET, ("127.0.0.1", 0))):
        with socket.socket(family) as server, socket.socket(family) as client:
            server.bind(address)
            server.listen()
            client.connect(server.getsockname())
            client.sendall(b"hi")
            with server.accept()[0] as heard:
                said = heard.recv(2)
    return said


def _share_memory() -> int:
    import multiprocessing
    from multiprocessing.shared_memory import SharedMemory

    lock, memory = multiprocessing.Lock(), SharedMemory(create=True, size=4096)
    with lock:
        memory.close()
        memory.unlink()
    return memory.size


def _link(job_dir: Path) -> None:
    (job_dir / "work" / "linked").write_text("x")
    (job_dir / "out" / "linked").hardlink_to(job_dir / "work" / "linked")
    (job_dir / "out" / "linked").unlink()
