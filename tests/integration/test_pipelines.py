"""The GitHub Action and the GitLab template: their files are valid, and their commands run against a real API."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightpress.core.errors import ErrorCode, NightpressError
from tests.face import OFFER, RECIPE, Face
from tests.models import bert_tiny_dir
from tests.service import ROOT

ACTION = ROOT / "deploy/ci/github/action.yml"
TEMPLATE = ROOT / "deploy/ci/gitlab/nightpress.yml"
pytestmark = pytest.mark.slow


class Pipeline:
    """A real API, and a thread that ends each job as a worker would: by the job's name."""

    def __init__(self, folder: Path) -> None:
        self.model = bert_tiny_dir(folder / "models")
        self.face = Face(folder, model_roots=[self.model.parent])
        self.face.start()
        with self.face.client() as client:
            client.models.register(str(self.model), "tiny")
        self.recipe = folder / "eights.yaml"
        self.recipe.write_text(yaml.safe_dump(RECIPE))
        self._stop = threading.Event()
        self._worker = threading.Thread(target=self._work)
        self._worker.start()

    def _work(self) -> None:
        while not self._stop.wait(0.05):
            claimed = self.face.store.claims.claim(OFFER, ttl_s=60)
            if claimed is None:
                continue
            bound = claimed.job.recipe["gates"]["size"]
            if bound == "<= 7%":
                self.face.fail(claimed, NightpressError(ErrorCode.NUMERICAL_FAILURE, "A weight is not finite."))
            else:
                self.face.succeed(claimed, verdict="rejected" if bound == "<= 1%" else "accepted")

    def close(self) -> None:
        self._stop.set()
        self._worker.join()
        self.face.close()

    def environment(self, folder: Path) -> dict[str, str]:
        """What a runner gives to a step, with the `nightpress` command of this environment in its PATH."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {
            "PATH": path,
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    pipeline = Pipeline(tmp_path_factory.mktemp("ci"))
    yield pipeline
    pipeline.close()


@dataclass(frozen=True)
class Step:
    status: int
    outputs: dict[str, str]
    summary: str
    log: str


def run_action(pipeline: Pipeline, folder: Path, **inputs: str) -> Step:
    """Run the action's second step as a runner does: expressions filled in, and `bash -eo pipefail`."""
    action = yaml.safe_load(ACTION.read_text())
    install, press = action["runs"]["steps"]
    assert install["run"] == 'python3 -m pip install --quiet "$PACKAGE"', "the only command that this test leaves out"
    given = {name: field.get("default", "") for name, field in action["inputs"].items()} | inputs
    context = {f"inputs.{name}": value for name, value in given.items()} | {"github.run_id": str(folder)}
    filled = {name: fill(text, r"\$\{\{ (\S+) \}\}", context) for name, text in press["env"].items()}
    assert "${{" not in press["run"], "an input in the script's text could add a command"
    files = {"GITHUB_OUTPUT": folder / "output", "GITHUB_STEP_SUMMARY": folder / "summary"}
    for file in files.values():
        file.touch()
    environment = pipeline.environment(folder) | filled | {name: str(file) for name, file in files.items()}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", press["run"]]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return Step(done.returncode, outputs, files["GITHUB_STEP_SUMMARY"].read_text(), done.stdout + done.stderr)


def run_template(pipeline: Pipeline, folder: Path, **inputs: str) -> Step:
    """Run the template's script as a runner does, with the inputs filled in."""
    job = rendered(**inputs)
    assert job["before_script"] == ['python3 -m pip install --quiet "$PACKAGE"']
    given = {"NIGHTPRESS_API_URL": pipeline.face.url, "NIGHTPRESS_API_KEY": pipeline.face.key}
    given |= {"CI_PROJECT_ID": "7", "CI_JOB_ID": str(folder.name)}
    environment = pipeline.environment(folder) | job["variables"] | given
    script = "\n".join(job["script"])
    done = subprocess.run(
        ["sh", "-e", "-c", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    return Step(done.returncode, {}, "", done.stdout + done.stderr)


def rendered(**inputs: str) -> dict[str, Any]:
    head, body = TEMPLATE.read_text().split("\n---\n")
    spec = yaml.safe_load(head)["spec"]["inputs"]
    given = {f"inputs.{name}": (field or {}).get("default", "") for name, field in spec.items()}
    given |= {f"inputs.{name}": value for name, value in inputs.items()}
    job: dict[str, Any]
    [job] = yaml.safe_load(fill(body, r"\$\[\[ (\S+) \]\]", given)).values()
    return job


def fill(text: str, pattern: str, values: dict[str, str]) -> str:
    return re.sub(pattern, lambda found: values.get(found[1], "x"), text)


def test_the_files_are_valid(tmp_path: Path) -> None:
    (tmp_path / "gitlab.yml").write_text(yaml.safe_dump({"nightpress": rendered(model="tiny", recipe="r")}))
    for schema, file in (("vendor.github-actions", ACTION), ("vendor.gitlab-ci", tmp_path / "gitlab.yml")):
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


def test_the_action_presses_and_fetches_and_a_step_that_runs_again_makes_no_second_job(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    own = {"api-url": pipeline.face.url, "api-key": pipeline.face.key, "recipe": str(pipeline.recipe)}
    done = run_action(pipeline, tmp_path, model="tiny", gates="size <= 50%\n\nsize <= 60%", **own)
    assert done.status == 0, done.log
    assert done.outputs["verdict"] == "accepted"
    with pipeline.face.client() as client:
        assert client.jobs.get(done.outputs["job"]).recipe["gates"] == {"size": "<= 60%"}
    assert done.summary == "# report"
    assert (tmp_path / "pressed/compressed-tensors/sub dir/model.safetensors").stat().st_size == 300_000
    again = run_action(pipeline, tmp_path, model="tiny", gates="size <= 50%\n\nsize <= 60%", **own, out="")
    assert again.outputs["job"] == done.outputs["job"]


def test_a_failed_job_ends_the_action(pipeline: Pipeline, tmp_path: Path) -> None:
    own = {"api-url": pipeline.face.url, "api-key": pipeline.face.key, "recipe": str(pipeline.recipe), "model": "tiny"}
    failed = run_action(pipeline, tmp_path, gates="size <= 7%", **own)
    assert (failed.status, "verdict" in failed.outputs) == (1, False)
    assert "not finite" in failed.log


def test_the_template_stops_at_a_gate_and_keeps_the_result_for_a_look(pipeline: Pipeline, tmp_path: Path) -> None:
    given = {"model": "tiny", "recipe": str(pipeline.recipe), "gates": "size <= 90% ;; size <= 1%"}
    missed = run_template(pipeline, tmp_path, **given, out="out folder")
    assert missed.status == 3, missed.log
    assert (tmp_path / "out folder/report.md").read_text() == "# report"
    assert (tmp_path / "out folder/compressed-tensors/config.json").read_text() == "{}"
