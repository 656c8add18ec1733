"""A real Trackio server is told of a job and of a study.

It runs where NIGHTPRESS_TRACKIO names the command `trackio` of an environment with Trackio, whose pins are not ours: so not in CI.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from pydantic import SecretStr

from nightpress.core.handoff.curves import line_of
from nightpress.core.handoff.frames import Metric
from nightpress.core.service.compose import Resources
from nightpress.core.service.jobs.records import MetricRow
from nightpress.core.service.trackers.courier import TrackerCourier
from nightpress.core.service.trackers.open import open_trackers
from tests.jobs import claim, submit, succeeded
from tests.servers import _Server, _wait, free_port
from tests.studies import StudyWorld

COMMAND = os.environ.get("NIGHTPRESS_TRACKIO", "")
pytestmark = [
    pytest.mark.skipif(
        not COMMAND, reason="NIGHTPRESS_TRACKIO names no command `trackio` of an environment with Trackio"
    ),
    pytest.mark.slow,
]
PROJECT = "nightpress-default"


class TrackioServer(_Server):
    """A self-hosted server whose write token is `letter`."""

    def start(self) -> Self:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        switches = {"TRACKIO_WRITE_TOKEN": "letter", "TRACKIO_DIR": str(self.folder), "GRADIO_SERVER_PORT": str(port)}
        switches |= {"GRADIO_ANALYTICS_ENABLED": "False", "BROWSER": "true", "HOME": str(self.folder)}
        self.process = self._spawn([COMMAND, "show", "--host", "127.0.0.1"], {**os.environ, **switches})
        _wait(lambda: self.ask("get_all_projects"), self.process, self.log, seconds=120)
        return self

    def ask(self, name: str, **arguments: Any) -> Any:
        answer = httpx.post(f"{self.url}/api/{name}", json={"args": [], "kwargs": arguments}, trust_env=False)
        return answer.raise_for_status().json()["data"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackioServer]:
    with TrackioServer(tmp_path_factory.mktemp("trackio")) as server:
        yield server


def test_a_job_and_a_study_are_runs(server: TrackioServer, tmp_path: Path, sqlite_url: str, bert_tiny: Path) -> None:
    world = StudyWorld(tmp_path, sqlite_url, bert_tiny)
    change = {"trackio_url": server.url, "trackio_token": SecretStr("letter")}
    settings = world.settings.model_copy(update=change)
    resources = Resources(settings, world.engine)
    [(tracker, url)] = open_trackers(settings)
    resources.trackers.use({tracker.name: url})
    courier = TrackerCourier(tracker, resources.trackers, resources.run_contents)

    def tell() -> None:
        while due := resources.trackers.take_due("trackio", limit=100):
            for row in sorted(due, key=lambda row: row.subject.startswith("job")):
                courier.attempt(row)

    recipe = {"name": "int4", "passes": [{"pass": "weight-only", "bits": 4}], "exports": ["compressed-tensors"]}
    job_id = submit(world.store, model_id=world.model, recipe=recipe, name="night 7")
    lease = claim(world.store).lease
    points = [Metric(name="loss", value=value, step=step) for step, value in enumerate((0.5, 0.25))]
    world.store.attempts.append_logs(lease, [("debug", line_of(point)) for point in points])
    world.store.attempts.record_event(lease, "checkpoint", {})
    tell()
    assert world.store.attempts.finish(lease, succeeded(lease, metrics=[MetricRow("int4", "perplexity", 24.5)]))
    tell()
    resources.promotions.promote("default", "tiny", job_id, key_id=None)
    tell()  # the figures once more: the server keeps each once

    [run] = server.ask("get_runs_for_project", project=PROJECT)
    assert run["id"] == job_id
    logs = server.ask("get_logs", project=PROJECT, run_id=job_id)
    assert [(line["step"], line["loss"]) for line in logs if "loss" in line] == [(0, 0.5), (1, 0.25)]
    [figures] = [line for line in logs if "int4/perplexity" in line]
    assert (figures["int4/perplexity"], figures["nightpress/ended"]) == (24.5, 1)
    [tracked] = resources.trackers.of(job_id)
    assert (tracked.up_to_date, tracked.error, tracked.run_id) == (True, None, job_id)

    study = world.run(world.create(trials=3))
    tell()
    tell()
    goals = [line for line in server.ask("get_logs", project=PROJECT, run_id=study.id) if "goal" in line]
    wanted = {trial.number: trial.goal for trial in world.trials(study) if trial.role == "search" and trial.goal}
    assert {line["step"]: line["goal"] for line in goals} == pytest.approx(wanted)

    refused = Resources(settings.model_copy(update={"trackio_token": SecretStr("wrong")}), world.engine)
    [(tracker, _)] = open_trackers(refused.settings)
    later = submit(world.store, model_id=world.model, recipe=recipe)
    lease = claim(world.store).lease
    assert world.store.attempts.finish(lease, succeeded(lease))
    [due] = resources.trackers.take_due("trackio", limit=5)
    TrackerCourier(tracker, resources.trackers, resources.run_contents).attempt(due)
    [tracked] = resources.trackers.of(later)
    assert not tracked.up_to_date
    assert tracked.error is not None
    world.engine.dispose()
