"""What is made of trials' results: the goal with its interval, how far gates are missed, the front, and what mattered."""

from typing import Any

import pytest

from nightpress.core.recipes.gates import parse_gate
from nightpress.core.recipes.search.auto import Goal
from nightpress.core.recipes.search.space import Space
from nightpress.core.service.studies.front import candidates_of, front_of, runner_up_of, sensitivity_of
from nightpress.core.service.studies.outcomes import outcome_of
from nightpress.core.service.studies.records import Outcome, Trial
from tests.trials import report_of

GATES = {"cosine": ">= 0.9"}


def trial(number: int, state: Any, goal: float | None, margin: float | None, **params: int) -> Trial:
    return Trial(
        number, "search", None, params, str(number), None, state, None, None, goal, None, None, None, margin, 0.0, 0.0
    )


TRIALS = [
    trial(0, "kept", 0.5, -0.01),
    trial(1, "kept", 0.3, -0.001),
    trial(2, "missed", 0.2, 0.003),
    trial(3, "missed", 0.1, 0.2),
    trial(4, "kept", 0.6, -0.005),  # trial 0 is smaller and has more room
    trial(5, "failed", None, None),
    trial(6, "screened", None, 0.001),
    trial(7, "kept", 0.9, -0.05),
    trial(8, "missed", 0.4, 0.001),  # larger than the best that keeps the gates
]


def test_the_front_has_what_no_other_beats_by_goal_and_margin():
    assert [entry.number for entry in front_of(TRIALS)] == [1, 0, 7]
    assert front_of([]) == []


def test_the_best_are_measured_again_the_front_first():
    assert [entry.number for entry in candidates_of(TRIALS, 2)] == [1, 0]
    assert [entry.number for entry in candidates_of(TRIALS, 9)] == [1, 0, 4, 7]


def test_the_runner_up_misses_least_among_those_with_a_better_goal():
    found = runner_up_of(TRIALS, TRIALS[1])
    assert found is not None
    assert found.number == 2
    nothing_kept = runner_up_of(TRIALS, None)
    assert nothing_kept is not None
    assert nothing_kept.number == 8
    assert runner_up_of(TRIALS[:2], TRIALS[1]) is None


def test_what_decides_the_goal_explains_it_and_what_does_not_explains_nothing():
    choice = {"choice": [1, 2, 3, 4]}
    space = Space([{"name": "s", "bits": choice, "noise": choice, "exports": []}])
    trials = [
        trial(at, "kept", 0.1 * (at % 4) + 0.001 * (at // 4), -0.1, **{"0.bits": at % 4, "0.noise": at // 4})
        for at in range(16)
    ]
    bits, noise = sensitivity_of(trials, space)
    assert (bits.parameter, noise.parameter) == ("0.bits", "0.noise")
    assert bits.share > 0.99
    assert noise.share == 0
    assert bits.trials == 16
    assert sensitivity_of(trials[:1], space) == []


def timed(**speedup: float) -> dict[str, Any]:
    return {"told_apart": True, "by_turns": True, "source_p50_ms": 10.0} | speedup


def ended(goal: Goal, *, cosine: float = 0.95, gates: dict[str, str] = GATES, **artifact: Any) -> Outcome:
    report = report_of("job_1", {"gates": GATES}, 0.25, cosine).model_dump(mode="json")
    report["artifacts"][0] |= artifact
    return outcome_of("succeeded", None, report, gates, goal)


def test_a_size_is_a_share_of_the_sources():
    assert ended("size") == Outcome(
        "kept",
        None,
        "compressed-tensors",
        0.25,
        None,
        None,
        [
            {
                "gate": "cosine >= 0.9",
                "observed": 0.95,
                "miss": pytest.approx(-0.05 / 0.9),
                "explanation": "0.9500 on builtin:prose",
            }
        ],
        pytest.approx(-0.05 / 0.9),
    )


def test_a_time_is_a_share_of_the_sources_and_its_interval_turns_round():
    timing = {"batch": 1, "length": 128, "threads": 1, "repeats": 5, "p50_ms": 5.0, "p95_ms": 6.0}
    timing |= {"throughput": 1.0, "throughput_unit": "sequences/s"}
    pair = [
        {**timing, "speedup": timed(value=2.0, low=1.6, high=2.5)},
        {**timing, "batch": 8, "speedup": timed(value=8.0, low=6.4, high=10.0)},
    ]
    found = ended("latency", timings=pair)
    assert (found.goal, found.goal_low, found.goal_high) == pytest.approx((1 / 4, 1 / 5, 1 / 3.2))
    unknown = ended("latency", timings=[timing])
    assert (unknown.state, unknown.goal) == ("missed", None)
    assert unknown.reason is not None
    assert "no figure that can be compared" in unknown.reason


def test_a_missed_gate_says_why_and_by_how_much():
    found = ended("size", cosine=0.81)
    assert (found.state, found.reason) == ("missed", "cosine >= 0.9: 0.8100 on builtin:prose")
    assert found.margin == pytest.approx(0.09 / 0.9)


@pytest.mark.parametrize(
    ("state", "error", "report", "expected"),
    [
        (None, None, None, ("failed", "Its job was deleted before its result was read.")),
        ("cancelled", None, None, ("cancelled", "Its job was cancelled.")),
        ("failed", {"code": "disk_full", "message": "No room."}, None, ("failed", "disk_full: No room.")),
        ("succeeded", None, None, ("failed", "Its job has no report.")),
        ("succeeded", None, {"schema_version": 2}, ("failed", None)),
    ],
)
def test_a_trial_without_a_result_says_why(state: Any, error: Any, report: Any, expected: tuple[str, str | None]):
    found = outcome_of(state, error, report, GATES, "size")
    assert found.state == expected[0]
    assert found.reason
    assert expected[1] is None or found.reason == expected[1]
    assert (found.goal, found.margin) == (None, None)


def test_of_several_artifacts_the_best_that_keeps_the_gates_counts():
    report = report_of("job_1", {"gates": GATES}, 0.5, 0.95).model_dump(mode="json")
    small = {**report["artifacts"][0], "name": "small", "size_bytes": 100_000}
    report["artifacts"].append(small)
    report["gates"].append({**report["gates"][0], "artifact": "small", "observed": 0.5, "passed": False})
    assert outcome_of("succeeded", None, report, GATES, "size").artifact == "compressed-tensors"
    report["gates"][1] |= {"observed": 0.91, "passed": True}
    assert outcome_of("succeeded", None, report, GATES, "size").artifact == "small"


def test_a_gate_that_was_not_measured_is_missed_by_much():
    report = report_of("job_1", {"gates": GATES}, 0.5, 0.95).model_dump(mode="json")
    report["gates"][0] |= {"observed": None, "passed": False}
    assert outcome_of("succeeded", None, report, GATES, "size").margin == 1.0
    assert str(parse_gate("cosine", ">= 0.9")) == "cosine >= 0.9"
