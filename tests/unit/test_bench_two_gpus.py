"""What `bench.two_gpus` makes of a run's progress and of its children's figures."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.record import Figure, read
from bench.two_gpus import Keeper, Marks
from tests.service import ROOT


def test_seconds_a_layer_are_those_between_the_second_block_and_the_last(monkeypatch: pytest.MonkeyPatch):
    times = iter([0.0, 10.0, 12.0, 14.5])
    monkeypatch.setattr("bench.two_gpus.time.perf_counter", lambda: next(times))
    marks = Marks("8b/gptq")
    for message in ("calibrating", "block 1 of 4", "block 2 of 4", "block 3 of 4", "block 4 of 4", "done"):
        marks.tell(0.0, message)
    assert marks.seconds == 2.25


def test_figures_of_children_are_kept_as_they_come_with_the_ratio_of_two_gpus(tmp_path: Path):
    lines = [
        [{"name": "8b on 1 GPU/awq/seconds", "value": 1.0, "unit": "s a layer"}],
        [{"name": "8b on 2 GPUs/awq/seconds", "value": 0.5, "unit": "s a layer"}],
        [{"name": "8b on 2 GPUs/gptq/seconds", "value": 0.5, "unit": "s a layer"}],
    ]
    code = f"import json; [print('FIGURES ' + json.dumps(line)) for line in {lines!r}]; print('other words')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        Keeper(tmp_path).listen(child)
    kept = {figure.name: figure for run in read("blocks_gpu", tmp_path) for figure in run.figures}
    assert kept["8b on 2 GPUs/awq/ratio"] == Figure("8b on 2 GPUs/awq/ratio", 2.0, "of one GPU's speed", bar=">= 1.85")
    assert kept.keys() == {
        "8b on 1 GPU/awq/seconds",
        "8b on 2 GPUs/awq/seconds",
        "8b on 2 GPUs/awq/ratio",
        "8b on 2 GPUs/gptq/seconds",
    }


LIMITED = """
import time
from bench.limits import CutOffError, limited
with limited("nothing", 30.0):
    pass
try:
    with limited("a wait", 0.05):
        time.sleep(30.0)
except CutOffError as error:
    print(error)
"""


def test_what_takes_too_long_is_cut_off():
    """In a process of its own: pytest's time limit uses the same timer."""
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "a wait: cut off after 0 s\n"
