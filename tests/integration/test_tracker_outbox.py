"""The outbox of trackers: which changes are noted, and what many rows cost."""

import time

import pytest
from sqlalchemy import Engine, insert

from nightpress.core.database import db_now, transaction
from nightpress.core.ids import new_id
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.trackers import tracked_runs
from nightpress.core.service.trackers.contents import flatten
from nightpress.core.service.trackers.store import TrackerStore
from tests.jobs import claim, submit, succeeded


def end_a_job(store: JobStore) -> str:
    job_id = submit(store)
    claimed = claim(store)
    assert store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    return job_id


def test_without_trackers_nothing_is_noted(engine: Engine, store: JobStore) -> None:
    outbox = TrackerStore(engine)
    assert outbox.of(end_a_job(store)) == []
    outbox.use({"mlflow": "http://mlflow:5000"})
    job_id = end_a_job(store)
    assert [run.tracker for run in outbox.of(job_id)] == ["mlflow"]
    outbox.use({})
    assert outbox.of(job_id) == []
    assert outbox.of(end_a_job(store)) == []


def test_a_change_while_a_row_is_told_is_told_next(engine: Engine, store: JobStore) -> None:
    outbox = TrackerStore(engine)
    outbox.use({"mlflow": "http://mlflow:5000"})
    submit(store)
    claimed = claim(store)
    store.attempts.record_event(claimed.lease, "checkpoint", {})
    [due] = outbox.take_due("mlflow", limit=5)
    assert store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    assert outbox.take_due("mlflow", limit=5) == [], "not told by two at the same time"
    assert outbox.told(due, lines=0, again_s=None)
    [again] = outbox.take_due("mlflow", limit=5)
    assert again.changed > due.changed
    assert outbox.told(again, lines=0, again_s=None)
    assert outbox.take_due("mlflow", limit=5) == []
    assert outbox.pending() == {"mlflow": 0}


@pytest.mark.slow
def test_ten_thousand_rows_cost_a_tick_no_more_than_ten(engine: Engine) -> None:
    outbox = TrackerStore(engine)
    outbox.use({"mlflow": "http://mlflow:5000"})

    def add(count: int) -> None:
        row = {"tracker": "mlflow", "changed": 1, "told": 0, "lines": 0, "attempts": 0}
        rows = [{**row, "subject": new_id("job")} for _ in range(count)]
        with transaction(engine) as connection:
            connection.execute(insert(tracked_runs).values(next_at=db_now(), created_at=db_now()), rows)

    def seconds() -> float:
        """The fastest of five ticks that take eight rows each."""
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            assert len(outbox.take_due("mlflow", limit=8)) == 8
            best = min(best, time.perf_counter() - began)
        return best

    add(40)
    few = seconds()
    add(10_000)
    assert seconds() < 3 * few + 0.01


def test_parameters_are_named_by_their_path() -> None:
    recipe = {"passes": [{"pass": "awq", "bits": 4, "symmetric": False}], "gates": {"size": "<= 50%"}, "device": None}
    assert flatten(recipe) == {
        "passes.0.pass": "awq",
        "passes.0.bits": "4",
        "passes.0.symmetric": "false",
        "gates.size": "<= 50%",
    }
