"""A real MLflow server for tests, from the environment that `make mlflow` makes."""

import os
from pathlib import Path
from typing import Self

import httpx

from tests.servers import _Server, _wait, free_port

COMMAND = os.environ.get("NIGHTPRESS_MLFLOW", "")
REASON = "NIGHTPRESS_MLFLOW does not name MLflow's command: `make mlflow` makes its environment"


class MlflowServer(_Server):
    """One tracking server with SQLite and a folder of artifacts. It may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        storage = ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        storage += ["--artifacts-destination", str(self.folder / "artifacts")]
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        # The server's jobs are for language models' judges, and need libraries that it runs without.
        switches = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = self._spawn([COMMAND, "server", *storage, *address], {**os.environ, **switches})
        _wait(lambda: httpx.get(f"{self.url}/health").raise_for_status(), self.process, self.log, seconds=90)
        return self
