"""Studies on the wire: searches for the best form of a model that keeps some gates."""

import datetime as dt
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from nightpress.core.recipes.calibration import Calibration, DataRef
from nightpress.core.recipes.gates import parse_gate
from nightpress.core.recipes.search.auto import Goal
from nightpress.core.wire.base import MAX_S, ONE_LINE, Labels, Request, View
from nightpress.core.wire.costs import CostView

StudyState = Literal["searching", "judging", "cancelling", "succeeded", "failed", "cancelled"]
TrialState = Literal["open", "kept", "missed", "screened", "failed", "cancelled", "refused"]
Reason = Literal["trials", "space", "deadline", "cpu", "gpu", "cost", "cancelled", "failures"]
Role = Literal["search", "judge"]

_HOUR_S = 3600.0
MAX_TRIALS = 5000


class StudyRequest(Request):
    """A search: the best form of a model by one figure, among those that keep some gates.

    `space`: `auto`, or recipes in which values may be `{choice: […]}` or `{range: [low, high]}`. What they leave out of `calibration`
    comes from the request; `evaluate` and `gates` are always the study's.
    """

    model: str = Field(min_length=1, max_length=128, examples=["all-minilm-l6-v2"])
    minimize: Goal = Field(
        "size", description="`size`, `latency` of a forward pass, time to `decode` a token, or peak `memory`."
    )
    gates: dict[str, str] = Field(
        min_length=1,
        max_length=16,
        examples=[{"perplexity": "<= +1%"}],
        description="Bounds that the result must keep, as in recipes.",
    )
    target: Literal["cpu-encoder", "cpu-llm", "gpu-vllm", "browser"] | None = Field(
        None,
        description="Where the result is to run. Left out: the model's own target, and for `size` and `memory` also transformers.",
    )
    space: Literal["auto"] | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=32)] = "auto"
    data: DataRef = Field(
        "builtin:prose", description="Data that quality is measured on. One half chooses, the other judges."
    )
    samples: int = Field(64, ge=2, le=100_000, description="Samples of that data for each measurement.")
    length: int = Field(128, ge=8, le=131_072, description="Tokens of each sample.")
    evaluate: list[dict[str, Any]] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="What is measured, as in recipes, in place of `data`, `samples` and `length`.",
    )
    calibration: dict[str, Any] | None = Field(
        None, description="Calibration text of all trials, in place of the space's own."
    )
    trials: int = Field(40, ge=1, le=MAX_TRIALS, description="Number of recipes to try at most.")
    parallel: int | None = Field(
        None, ge=1, le=256, description="Trials that run at the same time; left out: one for each worker seen lately."
    )
    hours: float = Field(
        24.0,
        gt=0,
        le=MAX_S / _HOUR_S,
        description="Hours after which the search ends; the last measurements come on top.",
    )
    cpu_hours: float | None = Field(None, gt=0, le=1e6, description="Hours of CPU workers after which the search ends.")
    gpu_hours: float | None = Field(None, gt=0, le=1e6, description="Hours of GPU workers after which the search ends.")
    max_cost: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="What the trials may cost, in the operator's currency; then the search ends.",
        exclude_if=lambda value: value is None,  # earlier versions refuse a field that they don't know
    )
    judge: int = Field(
        4, ge=1, le=16, description="How many of the best recipes are measured again on data that chose nothing."
    )
    screen: bool = Field(
        True, description="End a trial right after its passes where few texts show that it surely misses a gate."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1)
    start_from: str | None = Field(
        None, max_length=40, description="A study of the same space, whose best recipes are tried first."
    )
    name: str = Field("", max_length=200, pattern=ONE_LINE)
    priority: int = Field(0, ge=-100, le=100, description="higher first")
    labels: Labels = {}
    promote: bool = Field(True, description="let an accepted winner become the model name's latest")

    @field_validator("gates")
    @classmethod
    def _gates_parse(cls, gates: dict[str, str]) -> dict[str, str]:
        for figure, bound in gates.items():
            parse_gate(figure, bound)
        return gates

    @field_validator("calibration")
    @classmethod
    def _calibration_parses(cls, calibration: dict[str, Any] | None) -> dict[str, Any] | None:
        if calibration is not None:
            Calibration.model_validate(calibration)
        return calibration

    @model_validator(mode="after")
    def _evaluate_alone(self) -> Self:
        names = ("data", "samples", "length")
        given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if self.evaluate is not None and given:
            raise ValueError(f"`evaluate` takes the place of {', '.join(given)}: give one or the other")
        return self


class StudyCreate(StudyRequest):
    """A search, to begin now."""


class Best(View):
    """The best trial so far, on the data that chooses."""

    number: int
    job_id: str | None
    goal: float  #: as a share of the source's


class StudyView(View):
    id: str
    name: str
    state: StudyState
    reason: Reason | None  #: why the search ended
    verdict: Literal["accepted", "rejected"] | None  #: accepted: the winner keeps the gates on data that chose nothing
    model_id: str
    model_name: str
    model_digest: str
    minimize: Goal
    gates: dict[str, str]
    target: str | None
    automatic: bool  #: whether the space was made from the model
    space: list[dict[str, Any]]
    seed: int
    parallel: int
    trials: int  #: the most that are tried
    judge: int
    cpu_hours: float | None
    gpu_hours: float | None
    max_cost: float | None = None
    deadline_at: dt.datetime
    priority: int
    labels: dict[str, str]
    promote: bool
    proposed: int  #: trials that were begun, the last measurements included
    told: int  #: those of them that have ended
    counts: dict[str, int]  #: state of a trial → number of trials of the search
    cpu_seconds: float  #: seconds that CPU workers spent on trials that have ended
    gpu_seconds: float
    cost: CostView | None = None  #: of trials that have ended; null where the operator has set no prices
    best: Best | None
    winner_job_id: str | None  #: the job whose artifacts are the winner
    error: dict[str, Any] | None
    created_by: str | None
    created_at: dt.datetime
    finished_at: dt.datetime | None


class GateFigure(View):
    """How a trial stands to a gate. `miss`: by how much it is missed; at most 0: it is kept."""

    gate: str
    observed: float | None
    miss: float
    explanation: str = ""


class TrialView(View):
    """A recipe that was tried. `judge`: the last measurement of the recipe of trial `judges`, on data that chose nothing."""

    number: int
    role: Role
    judges: int | None
    state: TrialState
    reason: str | None  #: why it ended so
    choices: dict[str, Any]  #: parameter of the space → chosen value
    recipe: dict[str, Any]  #: its passes and exports
    artifact: str | None
    goal: float | None  #: as a share of the source's
    goal_low: float | None
    goal_high: float | None
    gates: list[GateFigure]
    margin: float | None  #: the largest `miss`; at most 0: every gate is kept
    known: int  #: it was proposed from the results of so many first trials
    job_id: str | None
    cpu_seconds: float
    gpu_seconds: float
    created_at: dt.datetime
    ended_at: dt.datetime | None


class Sensitivity(View):
    """How much a parameter matters for the goal."""

    parameter: str
    share: float  #: of the goal's variance that the parameter's value explains, 0 to 1
    trials: int  #: trials that had the parameter


class Front(View):
    """A recipe of the front, measured on data that chose nothing."""

    trial: int
    job_id: str | None
    recipe: dict[str, Any]
    goal: float
    goal_low: float | None
    goal_high: float | None
    goal_chosen: float  #: the goal on the data that chose it
    gates: list[GateFigure]
    kept: bool  #: whether it keeps every gate on the data that judges


class RunnerUp(View):
    """The nearest recipe that misses a gate and is better by the goal: what a looser gate would give."""

    trial: int
    job_id: str | None
    goal: float
    gain: float  #: share of the winner's goal that it would save
    misses: list[GateFigure]


class StudyReport(View):
    """What a study found."""

    winner: Front | None
    chosen_again: (
        bool  #: whether the search's first choice missed a gate on the data that judges, and the next took its place
    )
    front: list[Front]
    runner_up: RunnerUp | None
    sensitivity: list[Sensitivity]
    counts: dict[str, int]  #: state of a trial → number of trials of the search
    reasons: dict[str, int]  #: why trials ended without a result that keeps the gates → how many
    cpu_seconds: float  #: of all trials, the last measurements included
    gpu_seconds: float
    seconds: float  #: from the study's start to its end
    split: str  #: how the data was divided
