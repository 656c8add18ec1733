"""The child: one process for one job. It holds no credential, sees no network, and dies when its supervisor does.

`python -m worker.child --frames FD JOB_DIR` starts warm: it confines itself, imports the compression core, then waits for a
line on standard input. Every further byte there says that the supervisor still holds the job's lease; silence for longer than
the line allows, or the end of the stream, ends the child and everything it started.
"""

import argparse
import contextlib
import errno
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

import psutil

from core.errors import ErrorCode, NightpressError
from core.handoff.frames import Frame, Result
from core.handoff.manifest import Manifest
from core.handoff.spec import JobSpec
from worker import sandbox

FRAMES_FD = 3


Press = Callable[[Path, Callable[[Frame], None]], Manifest]


def _load_pipeline() -> Press:
    from core.compress import pipeline  # torch is imported here

    return pipeline.run


def main(argv: list[str] | None = None, *, load: Callable[[], Press] = _load_pipeline) -> NoReturn:
    """Confine this process, load what presses, wait for the word, press, and end."""
    parser = argparse.ArgumentParser(prog="python -m worker.child")
    parser.add_argument("--frames", type=int, default=FRAMES_FD, help="file descriptor the frames go to")
    parser.add_argument("--keep-network", action="store_true", help="don't cut this child off from the network")
    parser.add_argument("job_dir", type=Path)
    options = parser.parse_args(argv)
    if options.frames != FRAMES_FD:
        os.dup2(options.frames, FRAMES_FD, inheritable=False)
        os.close(options.frames)
    faulthandler.enable()
    sandbox.limit_resources()
    sandbox.adopt_orphans()
    # In this order: only a process without threads may change its user namespace, and Landlock binds only this thread and
    # those it starts from now on: the watch stays outside, so that it may kill, and every thread of torch is within.
    if not options.keep_network and not sandbox.leave_network():
        print("the kernel allows no network namespace: this job is not cut off from the network", file=sys.stderr)  # noqa: T201
    started: SimpleQueue[None] = SimpleQueue()
    threading.Thread(target=_watch_supervisor, args=(started,), name="supervisor-watch", daemon=True).start()
    if not sandbox.confine(options.job_dir):
        print("the kernel has no Landlock: this job can read what its user can read", file=sys.stderr)  # noqa: T201
    press = load()
    started.get()
    try:
        _run(options.job_dir, press)
        sys.stdout.flush()
        sys.stderr.flush()
    except (
        BrokenPipeError
    ):  # nobody listens any more; the watch, which may not have seen it yet, would end with this thread
        _end_with_all_it_started()
    os._exit(0)  # all is said; torch and the consumers' libraries may take a second to unload


def _watch_supervisor(started: "SimpleQueue[None]") -> None:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            os._exit(0)  # a spare that was never used
        line += byte
    try:
        patience = float(json.loads(line)["patience_s"])
    except (ValueError, KeyError):
        traceback.print_exc()
        os._exit(os.EX_PROTOCOL)  # better no child than one that waits for ever
    started.put(None)
    while select.select([0], [], [], patience)[0]:
        if not os.read(0, 4096):
            break
    _end_with_all_it_started()


def _end_with_all_it_started() -> None:
    """First those that left the group: orphans come back to this process, so each is found below it. Then the group."""
    me, left = psutil.Process(), True
    while left:
        left = False
        for one in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if one.status() != psutil.STATUS_ZOMBIE:
                    one.kill()
                    left = True
    os.killpg(os.getpid(), signal.SIGKILL)


def _run(job_dir: Path, press: Press) -> None:
    """Press, and say in the last frame how it went. Every error becomes one of the closed set."""
    lock = threading.Lock()

    def emit(frame: Frame) -> None:
        line = frame.model_dump_json().encode() + b"\n"
        with lock:
            _write_all(line)

    try:
        spec = JobSpec.load(job_dir)
        if spec.file_limit:
            sandbox.limit_file_size(spec.file_limit)
        press(job_dir, emit)
    except BaseException as error:
        traceback.print_exc()  # the supervisor puts standard error into the job's log
        emit(Result(error=_describe(error).as_dict()))
    else:
        emit(Result())


def _write_all(line: bytes) -> None:
    while line:
        line = line[os.write(FRAMES_FD, line) :]


def _describe(error: BaseException) -> NightpressError:
    if isinstance(error, NightpressError):
        return error
    if isinstance(error, MemoryError):
        return NightpressError(
            ErrorCode.OUT_OF_MEMORY,
            f"The job asked for more memory than there is: {error}.",
            hint="Use a worker with more memory, or a recipe whose passes stream.",
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module doesn't import by name
        return NightpressError(
            ErrorCode.GPU_OUT_OF_MEMORY,
            f"The GPU's memory did not suffice: {str(error).splitlines()[0]}",
            hint="Use a GPU with more memory, or smaller batches.",
        )
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return NightpressError(
            ErrorCode.DISK_FULL,
            f"The worker's disk did not take the result: {error.strerror}.",
            hint="Free space in the worker's NIGHTPRESS_DATA_DIR, or raise the limit on a file's size.",
        )
    return NightpressError(
        ErrorCode.INTERNAL,
        f"{type(error).__name__}: {str(error)[:500]}",
        hint="The traceback is in the job's log; please report it.",
    )


if __name__ == "__main__":
    main()
