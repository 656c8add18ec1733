"""A newcomer's whole path: start the service, submit a real model, wait, read the comparison, fetch the result, stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nightpress.core.handoff.manifest import MANIFEST_FILE, Manifest, describe_folder
from nightpress.core.handoff.report import Report
from tests.face import pulled_files
from tests.patience import slowness
from tests.servers import free_port
from tests.service import ROOT, eventually

COMMAND = [sys.executable, "-m", "nightpress.client.cli.main"]
RECIPE = """
name: small-int8
passes: [{pass: dynamic-int8}]
exports: [onnx]
evaluate:
  - {metric: fidelity, samples: 4, length: 16}
  - {metric: latency, batch: 1, length: 16, repeats: 3}
gates: {size: "<= 100%"}
"""
IMPOSSIBLE = RECIPE.replace("<= 100%", "<= 1%").replace("small-int8", "too-small")


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    # A unix socket's path has at most 107 bytes, so the long paths of pytest's folders don't fit.
    folder = tempfile.mkdtemp(prefix="np-")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTPRESS_")}
    yield clean | {
        "NIGHTPRESS_DATA_DIR": folder,
        "NIGHTPRESS_API_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "160",
    }
    shutil.rmtree(folder, ignore_errors=True)


def run(environment: dict[str, str], cwd: Path, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [*COMMAND, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == status, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_from_up_to_a_verified_artifact_on_disk(environment: dict[str, str], bert_tiny: Path, tmp_path: Path):
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "impossible.yaml").write_text(IMPOSSIBLE)
    stack = json.loads(run(environment, tmp_path, "up", "--detach", "--json"))
    try:
        job = json.loads(run(environment, tmp_path, "submit", str(bert_tiny), "-r", "small.yaml", "--wait", "--json"))
        assert (job["state"], job["verdict"], job["attempt"]) == ("succeeded", "accepted", 1)

        report = Report.model_validate_json(run(environment, tmp_path, "report", job["id"], "--json"))
        [pressed] = report.artifacts
        assert pressed.size_bytes < report.source.size_bytes
        assert pressed.verification is not None
        assert pressed.verification.passed
        assert pressed.measurements
        assert pressed.measurements[0].low is not None
        assert pressed.timings
        assert report.source.timings
        table = run(environment, tmp_path, "report", job["id"])
        for row in ("size", "latency, 1 × 16 tokens", "throughput", "peak memory", "verdict: accepted"):
            assert row in table, table

        run(environment, tmp_path, "pull", job["id"], "--out", "pulled")
        artifacts = json.loads(run(environment, tmp_path, "inspect", job["id"], "--json"))["artifacts"]
        assert [file.model_dump() for file in pulled_files(tmp_path / "pulled" / "onnx")] == artifacts[0]["files"]
        assert (tmp_path / "pulled" / "report.html").stat().st_size > 1000

        # The same model is not uploaded again. A missed gate is a verdict, not a failure of the job.
        rejected = json.loads(
            run(environment, tmp_path, "submit", str(bert_tiny), "-r", "impossible.yaml", "--wait", "--json", status=3)
        )
        assert (rejected["state"], rejected["verdict"]) == ("succeeded", "rejected")
        assert rejected["model_id"] == job["model_id"]
        assert run(environment, tmp_path, "doctor").count("FAIL") == 0
    finally:
        pids = json.loads((Path(stack["data_dir"]) / "devstack.json").read_text())["pids"].values()
        assert json.loads(run(environment, tmp_path, "down", "--json")) == {"stopped": True}
    eventually(lambda: not any(map(psutil.pid_exists, pids)))
    assert json.loads(run(environment, tmp_path, "down", "--json")) == {"stopped": False}


@pytest.mark.slow
def test_press_needs_no_service(environment: dict[str, str], bert_tiny: Path, tmp_path: Path):
    # Most of this model is embeddings, which the recipe doesn't compress. So the size gate is missed, but the result is kept.
    press = ("press", str(bert_tiny), "-r", "int8-weights", "-o", "result")
    out = json.loads(run(environment, tmp_path, *press, "--json", status=3))
    assert Path(out["out"]) == tmp_path / "result"
    assert out["report"]["verdict"] == "rejected"
    manifest = Manifest.model_validate_json((tmp_path / "result" / MANIFEST_FILE).read_bytes())
    [artifact] = manifest.artifacts
    assert describe_folder(tmp_path / "result" / artifact.path) == artifact.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result"]
    run(environment, tmp_path, *press, status=2)
    assert not os.environ.get("NIGHTPRESS_DATA_DIR")
    assert not list(Path(environment["NIGHTPRESS_DATA_DIR"]).iterdir())


def test_an_interrupted_press_leaves_nothing(environment: dict[str, str], bert_tiny: Path, tmp_path: Path):
    process = subprocess.Popen(
        [*COMMAND, "press", str(bert_tiny), "-r", "int8-encoder", "-o", "result"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline()  # wait until the first phase is shown
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60 * slowness())
    assert process.returncode == 130, err
    assert "nothing was written" in err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_demo_takes_its_stack_along(environment: dict[str, str], tmp_path: Path):
    process = subprocess.Popen(
        [*COMMAND, "demo"],
        env=environment | {"TMPDIR": str(tmp_path.parent)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = psutil.Process(process.pid)
    stack = eventually(
        lambda: [child for child in started.children(recursive=True) if "nightpress.worker.devstack" in child.cmdline()]
    )
    parts = eventually(lambda: stack[0].children() or not stack[0].is_running())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60 * slowness())
    assert process.returncode == 130
    assert isinstance(parts, list)
    eventually(lambda: not any(process.is_running() for process in (*stack, *parts)))
