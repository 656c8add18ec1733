"""Makes the report of a study from its rows."""

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from nightpress.core.recipes.search.space import Space
from nightpress.core.service.studies.front import runner_up_of, sensitivity_of
from nightpress.core.service.studies.records import Study, Trial
from nightpress.core.wire.studies import Front, GateFigure, RunnerUp, StudyReport

_SHOWN = ("passes", "exports", "calibration")
_SPLIT = (
    "Quality was measured on one half of each data set while choosing, and on the other half at the end. "
    "The halves are the same in every study. Times were measured anew."
)


def make_report(
    study: Study, trials: Sequence[Trial], recipes: Mapping[int, Mapping[str, Any]], now: dt.datetime
) -> tuple[StudyReport, Trial | None]:
    """Return the report, and the winner's last measurement; None if no recipe keeps the gates on the data that judges.

    trials: all of the study, ended. recipes: number of a last measurement → its recipe.
    """
    chosen = {trial.number: trial for trial in trials if trial.role == "search"}
    judged = sorted(
        (trial for trial in trials if trial.role == "judge"),
        key=lambda trial: (chosen[trial.judges or 0].goal or 0.0, trial.number),
    )
    front = [
        _front(trial, chosen[trial.judges or 0], recipes[trial.number]) for trial in judged if trial.goal is not None
    ]
    # The search's own order decides, so that the data that judges chooses as little as possible.
    winner = next((trial for trial in judged if trial.state == "kept"), None)
    search = list(chosen.values())
    report = StudyReport(
        winner=next((entry for entry in front if winner is not None and entry.trial == winner.judges), None),
        chosen_again=winner is not None and winner is not judged[0],
        front=front,
        runner_up=_runner_up(search, None if winner is None else chosen[winner.judges or 0]),
        sensitivity=sensitivity_of(search, Space(study.space["recipes"])),
        counts=_counted([trial.state for trial in search]),
        reasons=_counted([_short(trial) for trial in search if trial.state != "kept" and trial.reason]),
        cpu_seconds=sum(trial.cpu_s for trial in trials),
        gpu_seconds=sum(trial.gpu_s for trial in trials),
        seconds=max(0.0, (now - study.created_at).total_seconds()),
        split=_SPLIT,
    )
    return report, winner


def _front(judge: Trial, chosen: Trial, recipe: Mapping[str, Any]) -> Front:
    assert judge.goal is not None
    assert chosen.goal is not None
    return Front(
        trial=chosen.number,
        job_id=judge.job_id,
        recipe={key: recipe[key] for key in _SHOWN if key in recipe},
        goal=judge.goal,
        goal_low=judge.goal_low,
        goal_high=judge.goal_high,
        goal_chosen=chosen.goal,
        gates=_gates(judge),
        kept=judge.state == "kept",
    )


def _runner_up(search: Sequence[Trial], winner: Trial | None) -> RunnerUp | None:
    trial = runner_up_of(search, winner)
    if trial is None or trial.goal is None:
        return None
    best = 1.0 if winner is None or winner.goal is None else winner.goal
    return RunnerUp(
        trial=trial.number,
        job_id=trial.job_id,
        goal=trial.goal,
        gain=1 - trial.goal / best,
        misses=[gate for gate in _gates(trial) if gate.miss > 0],
    )


def _gates(trial: Trial) -> list[GateFigure]:
    return [GateFigure.model_validate(figure) for figure in trial.gates or []]


def _short(trial: Trial) -> str:
    """The gate or the error code of a trial's reason, without its figures."""
    return f"{trial.state}: {(trial.reason or '').split(':')[0]}"


def _counted(words: Sequence[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words))}
