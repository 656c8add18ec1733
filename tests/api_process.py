"""The API as a separate process that tests can kill.

`python tests/api_process.py before|after` runs the real API, which kills itself at the first submission, before or after the commit.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import update

from nightpress.api.__main__ import main
from nightpress.core.database import transaction
from nightpress.core.ids import new_id
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.service.access.keys import create_key
from nightpress.core.service.jobs.submission import JobSubmission
from nightpress.core.service.tables.registry import models
from tests.forked_process import Process
from tests.patience import slowness
from tests.servers import free_port
from tests.service import ROOT, TENANT, Service, eventually, module_of

SCOPES = ("jobs:read", "jobs:write", "models:read", "models:write")


class ApiProcess:
    """`python -m nightpress.api` of an installation, and a registered model with a header, so that the API can make a plan."""

    def __init__(self, service: Service, model: Path) -> None:
        self._service = service
        self._port = free_port()
        self._key = create_key(service.engine, tenant_id=TENANT, name="t", scopes=SCOPES)[1]
        service.model_id, service.model_digest = service.register(new_id("mdl"), model)
        self.job = {"model": service.model_id, "recipe": "int8-encoder"}
        self.process: Process | None = None
        header = inspect_model(FolderFiles(model)).model_dump(mode="json")
        with transaction(service.engine) as connection:
            connection.execute(update(models).where(models.c.id == service.model_id).values(header=header))

    def start(self, dies: str = "", tree: Path = ROOT) -> None:
        """Start the API. `dies`: "before" or "after" the commit of the first submission; empty: never. `tree`: the checkout to run."""
        script = ("tests/api_process.py", dies) if dies else ("-m", module_of(tree, "api"))
        more = {"NIGHTPRESS_API_PORT": str(self._port), "PYTHONPATH": str(tree)}
        self.process = self._service.start(*script, cwd=tree, **more)
        with self.client() as client:
            eventually(lambda: self._answers(client), within=60)

    @staticmethod
    def _answers(client: httpx.Client) -> bool:
        try:
            return client.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def client(self) -> httpx.Client:
        """A client that sends the same idempotency key with every request."""
        headers = {"Authorization": f"Bearer {self._key}", "Idempotency-Key": "k"}
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self._port}", headers=headers, timeout=20 * slowness(), trust_env=False
        )


if __name__ == "__main__":
    submit = JobSubmission.submit

    def dying(*args: Any, **kwargs: Any) -> Any:
        if sys.argv[1] == "after":
            submit(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    JobSubmission.submit = dying  # type: ignore[method-assign]
    main()
