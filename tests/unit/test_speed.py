"""How many times as fast an artifact is, and whether the difference is larger than the machine's noise."""

from pathlib import Path

import numpy as np
import pytest

from nightpress.core.compress import report as reports
from nightpress.core.compress.evaluate.beside import ConsumerBeside
from nightpress.core.compress.evaluate.remarks import remarks
from nightpress.core.compress.evaluate.speed import speedup
from nightpress.core.compress.export.task import Task
from nightpress.core.compress.report.costs import speed_line
from nightpress.core.handoff.report import Report, Speedup
from tests.reports import full_report


def _load(seed: int, rounds: int = 20) -> np.ndarray:
    """The factor by which other work slows each round: from 1 to 3."""
    return 1 + 2 * np.random.default_rng(seed).random(rounds)


@pytest.mark.parametrize("seed", range(5))
def test_runs_by_turns_tell_a_faster_model_apart_under_load_that_hits_both(seed: int) -> None:
    load = _load(seed)
    found = speedup(10 * load, 15 * load, by_turns=True)
    assert found.told_apart
    assert found.value == pytest.approx(1.5)
    assert found.low > 1.4


@pytest.mark.parametrize("seed", range(5))
def test_equal_models_are_not_told_apart_though_the_second_had_the_machine_for_itself(seed: int) -> None:
    found = speedup(10 * _load(seed, 20) / 2, 10 * _load(seed + 100, 20), by_turns=False)
    assert found.value > 1.5
    assert not found.told_apart


def test_a_quiet_machine_tells_models_apart_that_were_timed_one_after_the_other() -> None:
    noise = 1 + 0.02 * np.random.default_rng(0).random(20)
    found = speedup(10 * noise, 28 * noise[::-1], by_turns=False)
    assert found.told_apart
    assert 2.7 < found.low < found.value < found.high < 2.9


def _speedup(value: float, low: float, high: float) -> Speedup:
    return Speedup(
        value=value, low=low, high=high, told_apart=low > 1 or high < 1, by_turns=True, source_p50_ms=value * 10
    )


def _with_speedups(*speedups: Speedup) -> Report:
    report = full_report()
    artifact = report.artifacts[0]
    timings = tuple(
        timing.model_copy(update={"speedup": found}) for timing, found in zip(artifact.timings, speedups, strict=True)
    )
    return report.model_copy(update={"artifacts": (artifact.model_copy(update={"timings": timings}),)})


def test_a_speed_that_is_not_told_apart_is_no_headline() -> None:
    blurred = _speedup(2.8, 0.7, 5.1)
    report = _with_speedups(blurred, blurred)
    for page in (reports.render_markdown(report), reports.render_html(report)):
        assert "speed not told apart from the source's [0.7×, 5.1×]" in page.replace("&#39;", "'")
        assert "2.8× the speed" not in page
    assert "not told apart" in " ".join(remarks(report.artifacts[0], report.source))
    assert '"told_apart": false' in report.model_dump_json(indent=1)


def test_a_speed_that_is_told_apart_stands_with_its_interval() -> None:
    line = speed_line("speed", "{} the speed", [_speedup(2.1, 1.9, 2.3), _speedup(2.8, 2.6, 3.1)])
    assert line == "2.1× to 2.8× the speed [1.9×, 3.1×]"
    line = speed_line("speed", "{} the speed", [_speedup(1.1, 0.9, 1.3), _speedup(2.8, 2.6, 3.1)])
    assert line.endswith("not told apart from the source's at 1 of 2 shapes")


@pytest.mark.parametrize(
    ("source", "artifact", "limit"), [(None, 10**6, 0), (10**6, None, 0), (10**9, 10**9, 10**9), (10**15, 10**6, 0)]
)
def test_what_does_not_fit_beside_the_artifact_is_not_started(
    source: int | None, artifact: int | None, limit: int, tmp_path: Path
) -> None:
    task = Task("embedding", "AutoModel", (), (), np.zeros(4, np.int64), "mean", 1, 1)
    runner = tmp_path / "no such runner"
    with ConsumerBeside(runner, tmp_path, task, source, name="source", scratch=tmp_path, limit=limit) as beside:
        assert beside.open(artifact) is None
