"""The parts of the `nightpress` command that need no API: how fast it starts, what it says of GPUs and of differences."""

import subprocess
import sys

import pytest

from nightpress.client.cli.comparison import comparison_rows
from nightpress.client.cli.doctor import check_gpu
from nightpress.core.handoff.report import Speedup
from tests.face import make_report
from tests.service import ROOT


@pytest.mark.parametrize(
    ("value", "spread", "said"),
    [
        (2.0, 0.3, "2.0× faster"),
        (1.1, 0.2, "not told apart: 0.9× to 1.3×"),
        (0.9, 0.2, "not told apart: 0.7× to 1.1×"),
        (2 / 3, 0.1, "1.5× SLOWER"),
    ],
)
def test_a_difference_within_the_noise_is_called_none(value: float, spread: float, said: str):
    report = make_report("job_1", "accepted")
    [pressed] = report.artifacts
    low, high = value - spread, value + spread
    compared = Speedup(
        value=value, low=low, high=high, told_apart=not low <= 1 <= high, by_turns=True, source_p50_ms=20.0
    )
    timing = pressed.timings[0].model_copy(update={"p50_ms": 20.0 / value, "speedup": compared})
    changed = report.model_copy(update={"artifacts": (pressed.model_copy(update={"timings": (timing,)}),)})
    [latency] = [row for row in comparison_rows(changed) if row[0].startswith("latency")]
    assert latency[2] == f"{20.0 / value:.1f} ms ({said})"


@pytest.mark.parametrize(
    ("driver", "cuda", "gpus", "status", "said"),
    [
        (False, None, [], "ok", "none is needed"),
        (True, "12.8", [("NVIDIA H100 80GB HBM3", 85_000_000_000)], "ok", "NVIDIA H100 80GB HBM3 with 85.0 GB"),
        (True, None, [], "warning", "CPU build"),
        (True, "12.8", [], "warning", "built for CUDA 12.8, finds no GPU"),
    ],
)
def test_doctor_tells_why_torch_finds_no_gpu_and_what_to_do(
    driver: bool, cuda: str | None, gpus: list[tuple[str, int]], status: str, said: str
):
    check = check_gpu(driver=driver, cuda=cuda, gpus=gpus)
    assert check.status == status
    assert said in check.found
    assert bool(check.mend) == (status != "ok")


@pytest.mark.slow
def test_the_command_starts_without_torch_and_fast():
    probe = (
        "import sys, client.cli.main\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnxruntime', 'boto3', 'sqlalchemy', 'celery'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=ROOT)
