"""What a tracker is told of a run, and the Protocol of trackers."""

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

RunState = Literal["waiting", "running", "finished", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a curve or a figure."""

    name: str
    value: float
    step: int
    at: dt.datetime


@dataclass(frozen=True, slots=True)
class Version:
    """A promoted result, for a tracker's registry of models."""

    model: str  #: the registry's name of the model
    source: str | None  #: where the artifacts are; None: storage that only the service can read
    description: str
    current: bool  #: whether it is the model's latest promotion


@dataclass(frozen=True, slots=True)
class Run:
    """A job or a study as trackers see it."""

    subject: str  #: its id
    tenant_id: str
    name: str
    state: RunState
    started_at: dt.datetime
    ended_at: dt.datetime | None
    params: Mapping[str, str]
    tags: Mapping[str, str]
    points: tuple[Point, ...]  #: of curves: those after the last line that was told; of figures: all
    files: Mapping[str, str]  #: name → text, e.g. the report; only of a run that has ended
    version: Version | None
    parent: str | None  #: the study's id, of a trial
    lines: int  #: number of the last log line that `points` covers


class RunDeletedError(Exception):
    """The run was deleted in the tracker: a person does not want it there."""


class Tracker(Protocol):
    """Tells one tracker of runs. Everything may be told twice, since a process may be killed before it has stored that it told."""

    name: str

    def begin(self, run: Run, parent: str | None) -> str:
        """Find the run, or make it. parent: the tracker's id of the study's run. Returns the run's id."""
        ...

    def tell(self, run_id: str, run: Run, check: Callable[[], None]) -> None:
        """Send all of `run`. `check` is called before each request, and raises when the time for this attempt is over.

        Raises RunDeletedError, or any other exception if the tracker does not take it: then it is told again later.
        """
        ...

    def address(self, run: Run, run_id: str) -> str:
        """The run's page."""
        ...
