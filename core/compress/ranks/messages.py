"""What the process that runs a job and its ranks say to each other, pickled, over a pair of sockets.

Only processes of the same job in the same sandbox read these messages.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightpress.core.errors import NightpressError

HEARTBEAT_S = 2.0  #: seconds between two messages of a rank that works


@dataclass(frozen=True)
class Begin:
    """The first message to a rank: who it is, and where the others are found."""

    rank: int
    size: int
    meeting: Path  #: file of the rendezvous, which does not exist before
    device: str  #: `cpu` or `cuda`
    timeout_s: float  #: longest wait for the others


@dataclass(frozen=True)
class Task:
    """A function to call with `group` and `tell` added to its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Told:
    """A call of one of the context's functions: `progress`, `metric` or `checkpoint`. Only the first rank sends it."""

    name: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Alive:
    """Sent while a rank works."""


@dataclass(frozen=True)
class Done:
    """A rank has finished its task."""

    result: Any  #: of the first rank; None of the others
    peak_gpu_bytes: int


@dataclass(frozen=True)
class Failed:
    """A rank has ended with an error."""

    error: Any  #: an exception that can be pickled, or a `NightpressError` as a dictionary
    of_peers: bool  #: whether it only waited for the others in vain

    @classmethod
    def of(cls, error: BaseException, *, of_peers: bool) -> "Failed":
        if isinstance(error, NightpressError):
            return cls(error.as_dict(), of_peers)
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - this process's own error
        except Exception:  # an exception's own __reduce__ may raise anything
            return cls(RuntimeError(f"{type(error).__name__}: {error}"), of_peers)
        return cls(error, of_peers)

    def exception(self) -> BaseException:
        if isinstance(self.error, dict):
            return NightpressError.from_dict(self.error)
        assert isinstance(self.error, BaseException)
        return self.error
