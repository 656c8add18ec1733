"""The operator for Airflow and the blocks for Prefect, run by these libraries against a real API.

They run where NIGHTPRESS_AIRFLOW_PYTHON and NIGHTPRESS_PREFECT_PYTHON name environments in which Airflow 3 or Prefect 3 and Nightpress are
installed. Each is hundreds of MB with pins of its own, so not in CI.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.face import RECIPE
from tests.integration.test_pipelines import Pipeline
from tests.service import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    pipeline = Pipeline(tmp_path_factory.mktemp("orchestrators"))
    yield pipeline
    pipeline.close()


def run(pipeline: Pipeline, library: str, folder: Path) -> list[dict[str, Any]]:
    """Run tests/orchestrators/nights_….py in the library's environment. Returns the documents that it printed."""
    python = os.environ.get(f"NIGHTPRESS_{library.upper()}_PYTHON")
    if python is None:
        pytest.skip(f"NIGHTPRESS_{library.upper()}_PYTHON names no environment with {library} and nightpress")
    program = folder / "dags" / f"nights_{library}.py"  # Airflow runs only what is in its folder of DAGs
    program.parent.mkdir()
    shutil.copy(ROOT / "tests/orchestrators" / program.name, program)
    connection = {"conn_type": "http", "host": pipeline.face.url, "password": pipeline.face.key}
    environment = {
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "ADDRESS": pipeline.face.url,
        "KEY": pipeline.face.key,
        "RECIPE": json.dumps(RECIPE),
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW_CONN_NIGHTPRESS_DEFAULT": json.dumps(connection),
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    }
    for step in (["-m", "airflow", "db", "migrate"], ["-m", "airflow", "dags", "reserialize"]):
        if library == "airflow":
            done = subprocess.run(
                [python, *step], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run(
        [python, str(program)], env=environment, cwd=folder, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_airflow_runs_tasks_that_press(pipeline: Pipeline, tmp_path: Path) -> None:
    *tasks, trigger = run(pipeline, "airflow", tmp_path)
    by_name = {task["task"]: task for task in tasks}
    assert {name: task["state"] for name, task in by_name.items()} == {
        "kept": "success",
        "deferred": "success",
        "missed": "failed",
    }
    assert by_name["kept"]["xcom"]["verdict"] == "accepted"
    assert by_name["deferred"]["xcom"]["verdict"] == "accepted"
    assert by_name["missed"]["xcom"] is None
    with pipeline.face.client() as client:
        job = client.jobs.get(by_name["kept"]["xcom"]["id"])
    assert (job.labels, job.recipe["gates"]) == ({"by": "nights"}, {"size": "<= 60%"})
    fields = {"job_id": "job_1", "conn_id": "conn", "poll_s": 2.0}
    assert trigger == {"trigger": "nightpress.client.airflow.NightpressTrigger", **fields}


def test_prefect_runs_a_flow_that_presses(pipeline: Pipeline, tmp_path: Path) -> None:
    kept, missed = run(pipeline, "prefect", tmp_path)
    assert kept["verdict"] == "accepted"
    assert f"nightpress report {missed['id']}" in missed["error"]
    with pipeline.face.client() as client:
        assert client.jobs.get(kept["id"]).labels == {"by": "prefect"}
        assert client.jobs.get(missed["id"]).verdict == "rejected"
