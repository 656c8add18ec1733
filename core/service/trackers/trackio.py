"""Trackio: a job or study is a run of a tenant's project on a self-hosted Trackio server, with parameters, curves and figures.

Trackio has no states, files of runs or registry of models: the state and the verdict are in the run's configuration. Each point has an
identifier made of what it says, so that the server keeps a point that is sent again once. The requests are those of Trackio's own client
(trackio/remote_client.py, version 0.43), whose library would bring Gradio's client into the control process.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import httpx

from nightpress.core.service.trackers.tracker import Run
from nightpress.core.settings import Settings

_AT_A_TIME = 1000  #: entries in one request
_TIMEOUT_S = 10.0
_END = "nightpress/ended"  #: logged once a run has ended: 1 if it succeeded, else 0


class TrackioTracker:
    """Tells a Trackio server by its HTTP API."""

    name = "trackio"

    def __init__(self, settings: Settings) -> None:
        token = settings.trackio_token
        self._headers = {} if token is None else {"x-trackio-write-token": token.get_secret_value()}
        self._url = settings.trackio_url.rstrip("/")
        self._project = settings.tracker_project

    def begin(self, run: Run, parent: str | None) -> str:  # noqa: ARG002 - Trackio has no parents
        """The subject's id is the run's id, so there is nothing to find or make."""
        return run.subject

    def tell(self, run_id: str, run: Run, check: Callable[[], None]) -> None:
        steps: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
        for point in run.points:
            steps[point.step, point.at.isoformat()][point.name] = point.value
        if run.ended_at is not None:
            steps[0, run.ended_at.isoformat()][_END] = float(run.state == "finished")
        config = {**run.params, **run.tags, "nightpress.study": run.parent or ""}
        entries: list[dict[str, Any]] = [
            {
                "project": f"{self._project}-{run.tenant_id}",
                "run": f"{run.name} {run.subject[-6:]}",
                "run_id": run_id,
                "step": step,
                "metrics": metrics,
                "config": config,
                "log_id": hashlib.sha256(f"{run_id} {step} {at} {sorted(metrics)}".encode()).hexdigest(),
            }
            for (step, at), metrics in steps.items()
        ]
        for begin in range(0, len(entries), _AT_A_TIME):
            check()
            body = {"args": [], "kwargs": {"logs": entries[begin : begin + _AT_A_TIME], "hf_token": None}}
            sent = httpx.post(f"{self._url}/api/bulk_log", json=body, headers=self._headers, timeout=_TIMEOUT_S)
            answer = sent.raise_for_status().json()
            if answer.get("error") is not None:
                raise ConnectionError(str(answer["error"])[:500])

    def address(self, run: Run, run_id: str) -> str:  # noqa: ARG002
        return f"{self._url}/?project={self._project}-{run.tenant_id}"
