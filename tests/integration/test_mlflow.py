"""A real MLflow server is told of jobs, studies and promotions, also after it was down and after a courier was killed."""

import datetime as dt
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType
from sqlalchemy import select, update

from nightpress.core.database import transaction
from nightpress.core.handoff.curves import line_of
from nightpress.core.handoff.frames import Metric, Progress
from nightpress.core.service.compose import Resources
from nightpress.core.service.jobs.records import MetricRow
from nightpress.core.service.tables.trackers import tracked_runs
from nightpress.core.service.trackers.courier import TrackerCourier
from nightpress.core.service.trackers.mlflow import ALIAS, MlflowTracker
from nightpress.core.wire.trackers import TrackedView
from nightpress.worker.control import Control
from tests.jobs import claim, submit, succeeded
from tests.mlflow_server import COMMAND, REASON, MlflowServer
from tests.servers import free_port
from tests.service import eventually
from tests.studies import TENANT, StudyWorld

pytestmark = [pytest.mark.skipif(not COMMAND, reason=REASON), pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


class Told:
    """An installation on a database, with a courier that the test drives."""

    def __init__(self, world: StudyWorld, url: str) -> None:
        self.world, self.url = world, url
        self.settings = world.settings.model_copy(
            update={"mlflow_url": url, "tracker_project": world.settings.data_dir.name}
        )
        self.resources = Resources(self.settings, world.engine)
        self.store = self.resources.trackers
        self.store.use({"mlflow": url})
        self.courier = self.replica()
        self.client = MlflowClient(tracking_uri=url, registry_uri=url)

    def replica(self) -> TrackerCourier:
        return TrackerCourier(MlflowTracker(self.settings), self.store, self.resources.run_contents)

    def tell(self) -> int:
        """Tell all that is due, one row after the other. Returns the number of attempts."""
        count = 0
        while taken := self.store.take_due("mlflow", limit=100):
            for due in sorted(taken, key=lambda due: due.subject.startswith("job")):
                self.courier.attempt(due)
            count += len(taken)
        return count

    def make_due(self) -> None:
        """Let the pauses after failures be over."""
        long_ago = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
        with transaction(self.world.engine) as connection:
            waits = update(tracked_runs).where(tracked_runs.c.next_at.is_not(None))
            connection.execute(waits.values(next_at=long_ago))

    def of(self, subject: str) -> TrackedView:
        [tracked] = self.store.of(subject)
        return tracked

    def runs(self) -> list[MlflowRun]:
        """All runs of the installation's experiment, oldest first."""
        found = self.client.get_experiment_by_name(f"{self.settings.tracker_project}/{TENANT}")
        assert found is not None
        return list(self.client.search_runs([found.experiment_id], run_view_type=ViewType.ALL, order_by=["start_time"]))

    def run(self, subject: str) -> MlflowRun:
        [run] = [run for run in self.runs() if run.data.tags["nightpress.id"] == subject]
        return run


@pytest.fixture
def told(server: MlflowServer, sqlite_url: str, tmp_path: Path, bert_tiny: Path) -> Iterator[Told]:
    world = StudyWorld(tmp_path, sqlite_url, bert_tiny)
    yield Told(world, server.url)
    world.engine.dispose()


@pytest.fixture
def told_on_both(server: MlflowServer, sql_url: str, tmp_path: Path, bert_tiny: Path) -> Iterator[Told]:
    """On SQLite and on PostgreSQL."""
    world = StudyWorld(tmp_path, sql_url, bert_tiny)
    yield Told(world, server.url)
    world.engine.dispose()


def new_job(told: Told, **changes: Any) -> str:
    recipe = {"name": "int4", "passes": [{"pass": "weight-only", "bits": 4}], "exports": ["compressed-tensors"]}
    given = {"model_id": told.world.model, "recipe": recipe, "name": "night 7", "labels": {"team": "search"}}
    return submit(told.world.store, **given | changes)


def test_a_job_is_a_run_with_parameters_curves_figures_report_and_a_version(told: Told) -> None:
    job_id = new_job(told)
    assert told.tell() == 0, "a job that waits is no run yet"
    claimed = claim(told.world.store)
    attempts = told.world.store.attempts
    attempts.renew(claimed.lease, ttl_s=60, progress=Progress(phase="pressing", fraction=0.1))
    lines = [Metric(name="loss/block 0", value=value, step=step) for step, value in enumerate((0.5, 0.25))]
    told.world.store.attempts.append_logs(claimed.lease, [("debug", line_of(point)) for point in lines])
    attempts.append_logs(claimed.lease, [("info", "loss = 9 at step 9"), ("debug", "no curve = of any kind")])
    attempts.record_event(claimed.lease, "checkpoint", {"step": 1})
    assert told.tell() == 1

    run = told.run(job_id)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "night 7")
    assert run.data.params["passes.0.pass"] == "weight-only"
    assert run.data.params["passes.0.bits"] == "4"
    assert run.data.params["model"] == "tiny"
    assert run.data.tags["nightpress.label.team"] == "search"
    assert set(run.data.metrics) == {"loss/block 0"}

    attempts.append_logs(claimed.lease, [("debug", line_of(Metric(name="loss/block 0", value=0.125, step=2)))])
    figures = [MetricRow("int4", "perplexity", 24.5, low=24.0, high=25.0)]
    assert attempts.finish(claimed.lease, succeeded(claimed.lease, metrics=figures))
    prefix = f"jobs/{job_id}/attempts/{claimed.lease.attempt}"
    told.resources.objects.put_bytes(f"{prefix}/report.md", "# Card ✓".encode())
    assert told.tell() == 1

    run = told.run(job_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["nightpress.verdict"] == "accepted"
    curve_told = told.client.get_metric_history(run.info.run_id, "loss/block 0")
    assert [(point.step, point.value) for point in curve_told] == [(0, 0.5), (1, 0.25), (2, 0.125)]
    figures_told = {name: value for name, value in run.data.metrics.items() if name.startswith("int4")}
    assert figures_told == {"int4/perplexity": 24.5, "int4/perplexity/low": 24.0, "int4/perplexity/high": 25.0}
    assert text(told, run, "report.md") == "# Card ✓"
    assert '"verdict": "accepted"' in text(told, run, "report.json")
    version = told.client.get_model_version_by_alias("tiny", ALIAS)
    assert version.run_id == run.info.run_id
    assert f"nightpress pull {job_id}" in version.description
    tracked = told.of(job_id)
    assert (tracked.up_to_date, tracked.error, tracked.run_id) == (True, None, run.info.run_id)
    assert tracked.page is not None
    assert tracked.page.endswith(f"/runs/{run.info.run_id}")

    # A later promotion takes the alias, and going back gives it back. Versions are not made twice.
    later = new_job(told)
    claimed = claim(told.world.store)
    assert attempts.finish(claimed.lease, succeeded(claimed.lease))
    told.tell()
    assert told.client.get_model_version_by_alias("tiny", ALIAS).run_id == told.run(later).info.run_id
    told.resources.promotions.promote(TENANT, "tiny", job_id, key_id=None)
    told.tell()
    assert told.client.get_model_version_by_alias("tiny", ALIAS).run_id == run.info.run_id
    mine = [each for each in told.client.search_model_versions("name = 'tiny'") if each.run_id == run.info.run_id]
    assert len(mine) == 1
    assert len(told.client.get_metric_history(run.info.run_id, "int4/perplexity")) == 1, "told again, but kept once"


def test_a_server_that_is_down_holds_up_nothing_and_is_told_when_it_is_back(told: Told) -> None:
    away = Told(told.world, f"http://127.0.0.1:{free_port()}")
    job_id = new_job(away)
    claimed = claim(away.world.store)
    assert away.world.store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    assert away.tell() == 1
    assert away.tell() == 0, "it pauses after a failure"
    tracked = away.of(job_id)
    assert (tracked.up_to_date, tracked.run_id, tracked.attempts) == (False, None, 1)
    assert "refused" in (tracked.error or "")
    assert away.store.pending() == {"mlflow": 1}

    told.store.use({"mlflow": told.url})
    told.make_due()
    assert told.tell() == 1
    assert told.run(job_id).info.status == "FINISHED"
    assert told.store.pending() == {"mlflow": 0}


def test_a_killed_courier_leaves_one_run(told_on_both: Told) -> None:
    told = told_on_both
    job_id = new_job(told)
    claimed = claim(told.world.store)
    assert told.world.store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    [due] = told.store.take_due("mlflow", limit=10)
    assert told.store.take_due("mlflow", limit=10) == [], "another process has it"
    run = told.resources.run_contents.read(job_id)
    assert run is not None
    MlflowTracker(told.settings).begin(run, None)  # and here the process is killed: nothing is stored

    told.make_due()
    assert told.tell() == 1
    assert len(told.runs()) == 1
    assert told.run(job_id).info.status == "FINISHED"
    assert not told.store.told(due, lines=0, again_s=None), "the first process comes back: the row is no longer its own"


def test_a_run_that_a_person_deleted_is_left_alone(told: Told) -> None:
    job_id = new_job(told)
    claimed = claim(told.world.store)
    told.world.store.attempts.record_event(claimed.lease, "checkpoint", {})
    told.tell()
    told.client.delete_run(told.run(job_id).info.run_id)
    assert told.world.store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    told.tell()
    assert told.run(job_id).info.lifecycle_stage == "deleted"
    assert told.of(job_id).up_to_date


def test_a_study_is_a_parent_run_with_its_trials_below(told: Told) -> None:
    world = told.world
    study = world.create(trials=4)
    ended = world.run(study)
    told.make_due()
    told.tell()
    told.make_due()  # a trial whose study was not told yet waits for it
    told.tell()
    parent = told.run(study.id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["minimize"] == "size"
    trials = [trial for trial in world.trials(ended) if trial.job_id]
    below = [run for run in told.runs() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.data.tags["nightpress.id"] for run in below} == {trial.job_id for trial in trials}
    goals = told.client.get_metric_history(parent.info.run_id, "goal")
    wanted = {trial.number: trial.goal for trial in trials if trial.role == "search" and trial.goal is not None}
    assert {point.step: point.value for point in goals} == pytest.approx(wanted)
    assert '"winner"' in text(told, parent, "report.json")


def test_two_couriers_tell_each_row_once(told_on_both: Told) -> None:
    told = told_on_both
    jobs = []
    for _ in range(6):
        jobs.append(new_job(told))
        claimed = claim(told.world.store)
        assert told.world.store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    replicas = [told.courier, told.replica()]
    starting = [threading.Thread(target=replica.deliver) for replica in replicas]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    for replica in replicas:
        replica.close()
    assert sorted(run.data.tags["nightpress.id"] for run in told.runs()) == sorted(jobs)
    with transaction(told.world.engine, read_only=True) as connection:
        assert set(connection.execute(select(tracked_runs.c.attempts)).scalars()) == {0}


def text(told: Told, run: MlflowRun, name: str) -> str:
    folder = told.settings.data_dir / "fetched"
    folder.mkdir(exist_ok=True)
    return Path(told.client.download_artifacts(run.info.run_id, name, str(folder))).read_text()


def test_the_control_process_tells_the_server_that_its_settings_name(told: Told) -> None:
    told.store.use({})
    with_it = Control(told.resources, lambda _queue: None)
    with_it.tick()  # from now on, changes are noted
    job_id = new_job(told)
    claimed = claim(told.world.store)
    assert told.world.store.attempts.finish(claimed.lease, succeeded(claimed.lease))

    def is_told() -> bool:
        with_it.tick()
        return told.of(job_id).up_to_date

    eventually(is_told)
    with_it.close()
    assert told.run(job_id).info.status == "FINISHED"
    without = Control(told.world.resources, lambda _queue: None)
    without.tick()
    without.close()
    assert told.store.pending() == {}
