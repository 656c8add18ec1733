"""How the command line shows studies: progress, trials and the report."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from nightpress.client.cli import output
from nightpress.client.cli.cost import cost_text
from nightpress.core.wire.studies import Front, GateFigure, StudyReport, StudyView, TrialView

_REASONS = {
    "trials": "all trials were made",
    "space": "nothing new is left to try",
    "deadline": "its time was over",
    "cpu": "its CPU hours were used up",
    "gpu": "its GPU hours were used up",
    "cost": "its money was spent",
    "cancelled": "it was cancelled",
    "failures": "its trials failed",
}


class StudyProgress:
    """Prints a line for each change of a study: how many trials have ended, and the best so far."""

    def __init__(self) -> None:
        self._last = ""
        self._since = time.monotonic()

    def __call__(self, study: StudyView) -> None:
        said = describe(study)
        if said != self._last:
            self._last = said
            output.note(f"{time.monotonic() - self._since:7.1f} s  {said}")


def describe(study: StudyView) -> str:
    """State, number of trials and the best so far, in a line."""
    counts = {state: count for state, count in study.counts.items() if state != "open"}
    ended = sum(counts.values())
    words = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    best = "" if study.best is None else f"; best {_percent(study.best.goal)} of the source's {_goal(study)}"
    return f"{study.state}: {ended} of {study.trials} trials ({words or 'none ended yet'}){best}"


def print_study(study: StudyView) -> None:
    output.print_fields(
        [
            ("study", f"{study.id} {study.name}".strip()),
            ("model", study.model_name),
            ("wanted", f"least {_goal(study)} with {_gates(study.gates)}"),
            ("state", f"{study.state} ({study.verdict})" if study.verdict else study.state),
            ("search ended", _REASONS.get(study.reason or "", "")),
            ("trials", describe(study).partition(": ")[2]),
            ("took", _cost(study.cpu_seconds, study.gpu_seconds)),
            ("cost", cost_text(study.cost)),
            ("error", (study.error or {}).get("message")),
        ]
    )


def print_report(study: StudyView, report: StudyReport) -> None:
    """Print the winner and how to take it, the front, the runner-up, and which choices mattered."""
    if report.winner is None:
        output.say("\nNo recipe kept every gate on data that chose nothing.", "yellow")
    else:
        output.say(
            f"\nWinner: trial {report.winner.trial}, {_percent(report.winner.goal)} of the source's {_goal(study)}.",
            "green",
        )
        output.say(f"  {recipe_text(report.winner.recipe)}")
        for gate in report.winner.gates:
            output.say(f"  {_gate_text(gate)}")
        if report.chosen_again:
            output.say("  The search's first choice missed a gate on the data that judges; this is the next.")
        output.note(
            f"Take it: nightpress pull {report.winner.job_id}    its report: nightpress report {report.winner.job_id}",
            "dim",
        )
    if report.front:
        output.say("\nMeasured again on data that chose nothing:")
        output.print_table(
            ("trial", _goal(study), "95% interval", "gates", "recipe"),
            [_front_row(entry) for entry in report.front],
            right=(0, 1),
        )
    if report.runner_up is not None:
        misses = ", ".join(f"{gate.gate} by {_percent(gate.miss)}" for gate in report.runner_up.misses)
        saved = f"would save another {_percent(report.runner_up.gain)}"
        output.say(f"\nOn the other side of the gate: trial {report.runner_up.trial} misses {misses}, and {saved}.")
    if report.sensitivity:
        output.say(f"\nWhat mattered for the {_goal(study)}:")
        rows = [(entry.parameter, _percent(entry.share), entry.trials) for entry in report.sensitivity[:10]]
        output.print_table(("choice", "explains", "trials"), rows, right=(1, 2))
    output.note(
        f"\nCost: {_cost(report.cpu_seconds, report.gpu_seconds)}, {output.duration_text(report.seconds)} in all. {report.split}",
        "dim",
    )


def print_trials(trials: Sequence[TrialView]) -> None:
    rows = [
        (
            trial.number,
            trial.role if trial.judges is None else f"{trial.role} {trial.judges}",
            trial.state,
            "" if trial.goal is None else _percent(trial.goal),
            "" if trial.margin is None else f"{100 * trial.margin:+.2f}%",
            output.duration_text(trial.cpu_seconds + trial.gpu_seconds) if trial.ended_at else "",
            recipe_text(trial.recipe),
            trial.reason or "",
        )
        for trial in trials
    ]
    headers = ("trial", "role", "state", "goal", "margin", "time", "recipe", "why")
    output.print_table(headers, rows, right=(0, 3, 4, 5))


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Passes and exports in a line, e.g. `gptq bits 4 group size 32 → gguf-q8_0`."""
    passes = " + ".join(_pass_text(step) for step in recipe.get("passes", [])) or "no pass"
    exports = [
        entry if isinstance(entry, str) else f"{entry['format']}-{entry['type']}" for entry in recipe.get("exports", [])
    ]
    return f"{passes} → {', '.join(exports)}"


_TOLD = ("bits", "group_size", "budget", "share", "count", "min_cosine")


def _pass_text(step: Mapping[str, Any]) -> str:
    options = [f"{key.replace('_', ' ')} {step[key]}" for key in _TOLD if step.get(key) is not None]
    options += ["asymmetric"] if step.get("symmetric") is False else []
    options += ["embeddings too"] if step.get("embeddings") else []
    if isinstance(step.get("train"), Mapping):
        options.append(f"steps {step['train'].get('steps')}")
    return " ".join([str(step["pass"]), *options])


def _front_row(entry: Front) -> tuple[object, ...]:
    known = entry.goal_low is not None and entry.goal_high is not None
    interval = f"{100 * (entry.goal_low or 0):.1f}–{100 * (entry.goal_high or 0):.1f}%" if known else ""
    missed = [gate.gate for gate in entry.gates if gate.miss > 0]
    return (
        entry.trial,
        _percent(entry.goal),
        interval,
        "kept" if entry.kept else f"misses {', '.join(missed)}",
        recipe_text(entry.recipe),
    )


def _gate_text(gate: GateFigure) -> str:
    return f"{gate.gate}: {gate.explanation or gate.observed}"


def _gates(gates: Mapping[str, str]) -> str:
    return ", ".join(f"{figure} {bound}" for figure, bound in gates.items())


def _goal(study: StudyView) -> str:
    return "time to decode" if study.minimize == "decode" else study.minimize


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _cost(cpu: float, gpu: float) -> str:
    told = [
        f"{output.duration_text(seconds)} of {kind} workers"
        for kind, seconds in (("CPU", cpu), ("GPU", gpu))
        if seconds
    ]
    return " and ".join(told) or "nothing yet"
