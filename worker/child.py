"""The child: two processes for one job. The inner process compresses, inside the sandbox; the outer process only watches it.

`python -m nightpress.worker.child --frames FD JOB_DIR` starts in advance: the inner process builds the sandbox around itself, imports
torch and transformers, leaves a fork of itself that will start what loads models, imports the compression core, and waits. A line of JSON on the outer process's standard input starts the job. Every further byte there means that the
supervisor still holds the job's lease. If no byte comes for longer than the line allows, or the stream ends, the outer process kills
everything that the child started. The supervisor sees only the outer process, which ends with the same status or signal as the inner one.
"""

import argparse
import errno
import faulthandler
import gc
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Frame, Result
from nightpress.core.handoff.manifest import Manifest
from nightpress.core.handoff.spec import MEASURED_DIR, JobSpec
from nightpress.worker import sandbox
from nightpress.worker.enclosure import Enclosure, enclose
from nightpress.worker.walls import Walls

FRAMES_FD = 3


Press = Callable[[Path, Callable[[Frame], None]], Manifest]


def _load_pipeline(job_dir: Path) -> Press:
    """Import the libraries, leave a fork that has nothing else, and import the compression core.

    The imports make a million objects, and none of them is garbage: the collector would take a third of the time to find that out.
    """
    gc.disable()
    from nightpress.core.compress.export import nursery
    from nightpress.core.compress.export.consumer_environment import runner_environment
    from nightpress.core.compress.runners.nursery import import_libraries

    import_libraries()
    nursery.fork_off(runner_environment("cuda", int(os.environ["OMP_NUM_THREADS"]), job_dir / MEASURED_DIR))
    from nightpress.core.compress import pipeline

    gc.freeze()
    gc.enable()
    return pipeline.run


def main(argv: list[str] | None = None, *, load: Callable[[Path], Press] = _load_pipeline) -> NoReturn:
    """Start the inner process, which imports the core, waits for the start, runs the job and ends. Watch it until it ends."""
    parser = argparse.ArgumentParser(prog="python -m nightpress.worker.child")
    parser.add_argument("--frames", type=int, default=FRAMES_FD, help="file descriptor the frames go to")
    parser.add_argument("--keep-network", action="store_true", help="don't cut this child off from the network")
    parser.add_argument("job_dir", type=Path)
    options = parser.parse_args(argv)
    if options.frames != FRAMES_FD:
        os.dup2(options.frames, FRAMES_FD, inheritable=False)
        os.close(options.frames)
    sandbox.limit_resources()
    sandbox.adopt_orphans()
    begun, begin = os.pipe()

    def work(walls: Walls) -> NoReturn:
        os.close(begin)
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)  # standard input belongs to the outer process
        faulthandler.enable()
        if walls.down:
            print(f"From this job, this is {walls}", file=sys.stderr)  # noqa: T201
        press = load(options.job_dir)
        if not os.read(begun, 1):
            os._exit(0)  # a spare that was never used
        try:
            _run(options.job_dir, press)
            sys.stdout.flush()
            sys.stderr.flush()
        except BrokenPipeError:
            os._exit(os.EX_IOERR)  # the supervisor has closed the pipe
        os._exit(0)  # without cleaning up: unloading torch and the runtimes' libraries may take a second

    inner = enclose(options.job_dir, work, network=options.keep_network)
    os.close(begun)
    os.close(FRAMES_FD)  # so that the stream of frames ends when the inner process ends
    _watch(inner, begin)


def _watch(inner: Enclosure, begin: int) -> NoReturn:
    """Wait until the inner process ends, or the supervisor stops it or falls silent. Then end this process too."""
    ended = os.pidfd_open(inner.pid)
    line, patience = b"", None
    while True:
        ready, _, _ = select.select([ended, 0], [], [], patience)
        if ended in ready:
            _end_like(inner)
        heard = os.read(0, 4096 if patience else 1) if ready else b""
        if not heard:  # silence, or the end of the stream
            _end_all(inner, used=patience is not None)
        if patience is None:
            line += heard
            if line.endswith(b"\n"):
                try:
                    patience = float(json.loads(line)["patience_s"])
                except (ValueError, KeyError):
                    traceback.print_exc()
                    inner.end()
                    os._exit(os.EX_PROTOCOL)  # otherwise the child would wait forever
                os.write(begin, b".")


def _end_all(inner: Enclosure, *, used: bool) -> NoReturn:
    inner.end()
    if used:
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)  # a spare that was never used


def _end_like(inner: Enclosure) -> NoReturn:
    """Kill what the inner process left running, then end with the same status or signal as the inner process."""
    status = inner.wait()
    inner.end()
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)  # Python has its own handlers for some signals
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _run(job_dir: Path, press: Press) -> None:
    """Run the job, and report its end in the last frame. Every error is translated to one of the closed set."""
    lock = threading.Lock()

    def emit(frame: Frame) -> None:
        line = frame.model_dump_json().encode() + b"\n"
        with lock:
            _write_all(line)

    try:
        spec = JobSpec.load(job_dir)
        if spec.file_limit:
            sandbox.limit_file_size(spec.file_limit)
        if (
            spec.gpus is not None
        ):  # the child may have started before its GPUs were known; CUDA reads this when it is first used
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(spec.gpus)
        press(job_dir, emit)
    except BaseException as error:
        traceback.print_exc()  # the supervisor copies standard error to the job's log
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
    if type(error).__name__ == "OutOfMemoryError":  # torch's class; this module does not import torch
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
