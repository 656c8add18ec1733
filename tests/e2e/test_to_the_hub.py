"""The page that leads from an installation to the Hub and to MLflow: its commands, against an imitation of the Hub and a real MLflow server."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.e2e.test_docs_commands import blocks_of, commands_of
from tests.forked_command import forked_command
from tests.hub import Hub, serve_hub
from tests.mlflow_server import COMMAND, REASON, MlflowServer
from tests.servers import free_port
from tests.service import ROOT, eventually

PAGE = ROOT / "docs" / "how-to" / "to-the-hub.md"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        hub.writes.tokens = {"hf_right"}
        yield hub


@pytest.fixture
def shell(hub: Hub, tmp_path: Path, bert_tiny: Path) -> Iterator[dict[str, str]]:
    """The environment of a shell in a folder with a model. What it starts is ended."""
    home = tempfile.mkdtemp(prefix="np-")  # a unix socket's path has at most 107 bytes
    shutil.copytree(bert_tiny, tmp_path / "my-model")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTPRESS_")}
    environment |= {"HOME": home, "NIGHTPRESS_API_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_TOKEN": "hf_right", "NIGHTPRESS_HUB_ENDPOINT": hub.url}
    environment["NIGHTPRESS_DESTINATION_NETWORKS"] = '["127.0.0.0/8"]'  # where the imitation is
    environment["NIGHTPRESS_WORKER_SPARE"] = "false"  # the last spare would import torch in vain
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("XDG_CONFIG_HOME", None)
    (command := Path(home) / "command").mkdir()
    with forked_command(command, environment) as commands:
        environment["PATH"] = f"{commands}:{environment['PATH']}"
        yield environment
        subprocess.run(["nightpress", "down"], env=environment, cwd=home, capture_output=True, check=True)
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(not COMMAND, reason=REASON)
def test_seven_commands_lead_to_the_hub_and_to_mlflow(hub: Hub, shell: dict[str, str], tmp_path: Path):
    page = PAGE.read_text()
    install, *commands = [command.text for command in commands_of(blocks_of(page)[0])]
    assert len(commands) == 6
    assert install.startswith("pip install 'nightpress[")  # tests/e2e/test_wheel.py installs it
    with MlflowServer(tmp_path / "mlflow") as mlflow:
        script = "set -e\n" + "\n".join(commands)
        for shown, run in (
            ("http://mlflow.example.com:5000", mlflow.url),
            ("--recipe int8-encoder", "--recipe sparse-half"),  # a graph takes half a minute to trace
        ):
            assert shown in script
            script = script.replace(shown, run)
        done = subprocess.run(
            ["bash", "-c", script], env=shell, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

        def listed(what: str) -> list[dict[str, Any]]:
            told = subprocess.run(["nightpress", what, "--json"], env=shell, capture_output=True, check=True)
            found = (
                json.loads(told.stdout)
                if told.stdout.startswith(b"[")
                else [*map(json.loads, told.stdout.splitlines())]
            )
            return list(found)

        eventually(lambda: [job["state"] for job in listed("ls")] == ["succeeded"], within=90, every=2)
        assert [job["verdict"] for job in listed("ls")] == ["accepted"]
        states = eventually(
            lambda: {delivery["state"] for delivery in listed("deliveries")} - {"pending", "sending"}, every=1
        )
        assert states == {"delivered"}, listed("deliveries")
        repository = "models/acme/my-model-int8"
        files = hub.repositories[repository][hub.branches[repository, "main"]]
        assert {"README.md", "report.json", "config.json"} <= set(files)
        client = MlflowClient(tracking_uri=mlflow.url)

        def told() -> bool:
            experiment = client.get_experiment_by_name("nightpress/default")
            runs = client.search_runs([experiment.experiment_id]) if experiment else []
            return [run.info.status for run in runs] == ["FINISHED"]

        eventually(told, within=60)
