"""Reads a child's frames and output, and watches its memory and its end."""

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff import curves
from nightpress.core.handoff.frames import (
    MAX_FRAME_BYTES,
    Checkpoint,
    Frame,
    Log,
    Metric,
    Progress,
    Result,
    Span,
    parse_frame,
)
from nightpress.core.tracing import record_span
from nightpress.worker.cgroup import oom_kills
from nightpress.worker.lease import LeaseKeeper
from nightpress.worker.process import ChildProcess

_TICK_S = 0.2
_MEMORY_EVERY_S = 0.5
_EXIT_GRACE_S = 5.0  #: longest time between the last frame and the end of the process
_NEAR_LIMIT = 0.9
_MAX_CHATTER_BYTES = 16 * 1024


class Relay:
    """Passes on a child's frames and output until it ends, and finds out why it ended."""

    def __init__(
        self,
        child: ChildProcess,
        keeper: LeaseKeeper,
        *,
        keep: Callable[[Checkpoint], None],
        memory_limit: int,
        stall_s: float,
    ) -> None:
        self._child = child
        self._keeper = keeper
        self._keep = keep
        self._memory_limit = memory_limit
        self._stall_s = stall_s
        self._peak_memory = 0
        self._result: Result | None = None
        self._where: tuple[object, ...] = ()
        self._progressed = time.monotonic()
        self._oom_kills = oom_kills()
        self._lines = {
            child.frames: _Lines(MAX_FRAME_BYTES, self._take_frame),
            child.chatter: _Lines(_MAX_CHATTER_BYTES, self._take_chatter),
        }

    def run(self, check: Callable[[], None]) -> None:
        """Return when the child has finished its job. Raises the child's error, what `check` raises, or an error for the child's end."""
        with selectors.DefaultSelector() as selector:
            for stream in self._lines:
                os.set_blocking(stream, False)
                selector.register(stream, selectors.EVENT_READ)
            weighed = 0.0
            # The child ends when its frames end. Its output is no sign: processes that it started may keep standard error open.
            while self._result is None and self._child.frames in selector.get_map():
                for key, _ in selector.select(_TICK_S):
                    with contextlib.suppress(BlockingIOError):
                        if not self._read(key.fd):
                            selector.unregister(key.fd)
                check()
                if time.monotonic() - weighed > _MEMORY_EVERY_S:
                    weighed = time.monotonic()
                    self._weigh()
                if time.monotonic() - self._progressed > self._stall_s:
                    raise NightpressError(
                        ErrorCode.STALLED,
                        f"The job made no progress for {self._stall_s:g} s.",
                        hint="Its log shows what it was at. Raise NIGHTPRESS_STALL_S if a step may take so long.",
                    )
        status = self._child.wait(_EXIT_GRACE_S)
        with contextlib.suppress(BlockingIOError):
            while self._read(self._child.chatter):
                pass
        if self._result is None:
            raise self._untimely_end(status)
        if self._result.error is not None:
            error = _error_of(self._result.error)
            # One of several processes that compute a model together may be the one that the kernel chose.
            killed = error.code is ErrorCode.WORKER_LOST and error.details.get("signal") == signal.SIGKILL
            raise self._out_of_memory("was killed by the kernel at") if killed and self._memory_ran_out() else error

    def _read(self, stream: int) -> bool:
        """Read the available bytes. False at the end of the stream."""
        data = os.read(stream, 64 * 1024)
        self._lines[stream].feed(data)
        return bool(data)

    def _take_chatter(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._keeper.log_line("info", text)

    def _take_frame(self, line: bytes) -> None:
        try:
            frame = parse_frame(line)
        except ValidationError:
            self._keeper.log_line("warning", f"The child sent a frame that can't be read: {line[:200]!r}")
            return
        if isinstance(frame, Result):
            self._result = frame
        elif isinstance(frame, Span):
            record_span(frame.name, frame.started_ns, frame.ended_ns, of_child=True)
        elif isinstance(frame, Log):
            self._keeper.log_line(frame.level, frame.text)
        else:
            self._advance(frame)

    def _advance(self, frame: Frame) -> None:
        if isinstance(frame, Progress):
            where = (frame.phase, frame.fraction, frame.pass_index, frame.message)
            if where == self._where:
                return  # a repeated frame shows that the child lives, but is no progress
            self._where = where
            self._keeper.progress(frame)
        elif isinstance(frame, Checkpoint):
            self._keep(frame)
        elif isinstance(frame, Metric):
            self._keeper.log_line(curves.LEVEL, curves.line_of(frame))
        self._progressed = time.monotonic()

    # Memory and the end ----------------------------------------------------------------------------------------------

    def _weigh(self) -> None:
        used = self._child.anonymous_memory()
        self._peak_memory = max(self._peak_memory, used)
        if self._memory_limit and used > self._memory_limit:
            raise self._out_of_memory("was stopped at")

    def _out_of_memory(self, what: str) -> NightpressError:
        return NightpressError(
            ErrorCode.OUT_OF_MEMORY,
            f"The job {what} {self._peak_memory / 1e9:.2f} GB; it may use {self._memory_limit / 1e9:.2f} GB here.",
            hint="Use a worker with more memory, or a recipe whose passes stream.",
            peak_bytes=self._peak_memory,
            limit_bytes=self._memory_limit,
        )

    def _memory_ran_out(self) -> bool:
        """Whether a process that was killed was killed for want of memory."""
        return oom_kills() > self._oom_kills or self._peak_memory > _NEAR_LIMIT * self._memory_limit > 0

    def _untimely_end(self, status: int | None) -> NightpressError:
        if status == -signal.SIGKILL and self._memory_ran_out():
            return self._out_of_memory("was killed by the kernel at")
        if status is None:
            how = "closed its connection but did not end"
        elif status < 0:
            how = f"was ended by signal {-status} ({_name_of_signal(-status)})"
        else:
            how = f"ended with status {status}"
        return NightpressError(
            ErrorCode.WORKER_LOST,
            f"The child process {how} before it had a result.",
            hint="The job's log has its last words.",
            status=status,
            signal=-status if status is not None and status < 0 else None,
            peak_bytes=self._peak_memory,
        )


def _name_of_signal(number: int) -> str:
    """E.g. SIGSEGV. Most real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"


class _Lines:
    """Splits a stream into lines and calls `take` for each. Lines are cut at `limit` bytes; the rest of the line is dropped."""

    def __init__(self, limit: int, take: Callable[[bytes], None]) -> None:
        self._limit = limit
        self._take = take
        self._rest = b""
        self._skipping = False

    def feed(self, data: bytes) -> None:
        """Add bytes of the stream. Empty bytes mean its end."""
        if not data:
            if self._rest:
                self._take(self._rest)
            self._rest = b""
            return
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self._skipping:
                self._take(line[: self._limit])
            self._skipping = False
        if len(rest) > self._limit:
            if not self._skipping:
                self._take(rest[: self._limit])
            rest, self._skipping = b"", True
        self._rest = rest


def _error_of(raw: dict[str, Any]) -> NightpressError:
    """The error that the child reported. It affects only the child's own job, but it may be malformed."""
    try:
        return NightpressError.from_dict(raw)
    except (KeyError, TypeError, ValueError):
        return NightpressError(ErrorCode.INTERNAL, f"The child failed without a usable reason: {str(raw)[:500]}")
