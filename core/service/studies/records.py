"""The records that the study store takes and returns."""

import datetime as dt
from dataclasses import dataclass, field
from typing import Any

from nightpress.core.recipes.search.auto import Goal
from nightpress.core.recipes.search.space import Params
from nightpress.core.wire.studies import Reason, Role, StudyState, TrialState


@dataclass(frozen=True, slots=True)
class Study:
    """A row of `studies`, without its report. Each field is a column of the same name."""

    id: str
    tenant_id: str
    name: str
    state: StudyState
    reason: Reason | None
    model_id: str
    model_name: str
    model_digest: str
    minimize: Goal
    gates: dict[str, str]
    target: str | None
    space: dict[str, Any]  #: `recipes`, and the `evaluate` and `screen` of every trial
    automatic: bool
    starts: list[Params]
    seed: int
    parallel: int
    max_trials: int
    max_judged: int
    cpu_limit_s: float | None
    gpu_limit_s: float | None
    cost_limit: float | None  #: in the operator's currency
    deadline_at: dt.datetime
    priority: int
    labels: dict[str, str]
    promote: bool
    created_by: str | None
    proposed: int
    told: int
    cpu_s: float
    gpu_s: float
    event_seq: int
    created_at: dt.datetime


@dataclass(frozen=True, slots=True)
class Trial:
    """A row of `study_trials`, as far as proposals and the report need it."""

    number: int
    role: Role
    judges: int | None
    params: Params
    digest: str
    job_id: str | None
    state: TrialState
    reason: str | None
    artifact: str | None
    goal: float | None
    goal_low: float | None
    goal_high: float | None
    gates: list[dict[str, Any]] | None
    margin: float | None
    cpu_s: float
    gpu_s: float


@dataclass(frozen=True, slots=True)
class NewTrial:
    """A trial to begin."""

    number: int
    role: Role
    params: Params
    known: int
    recipe: dict[str, Any]  #: normalised
    digest: str
    judges: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended."""

    state: TrialState
    reason: str | None = None
    artifact: str | None = None
    goal: float | None = None
    goal_low: float | None = None
    goal_high: float | None = None
    gates: list[dict[str, Any]] = field(default_factory=list)  #: core.wire.studies.GateFigure
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """An open trial whose job has ended, or is gone."""

    number: int
    role: Role
    recipe: dict[str, Any]
    job_id: str | None
    job_state: str | None
    error: dict[str, Any] | None
    cpu_s: float
    gpu_s: float
    cost_micros: int = 0  #: in millionths of the currency


@dataclass(frozen=True, slots=True)
class Progress:
    """What the control process must know of a study before each step."""

    state: StudyState
    proposed: int
    open_jobs: tuple[str, ...]  #: of the trials that have not ended
    first_open: int | None  #: the lowest number of these
    cpu_s: float  #: spent, running trials included
    gpu_s: float
    cost: float  #: in the operator's currency
    overdue: bool  #: whether the deadline has passed
    at: dt.datetime  #: the database's time
