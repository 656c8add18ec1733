"""Listing, histories, logs, workers and figures."""

import datetime as dt
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, update

from nightpress.core.database import db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.attempts import MAX_LOG_BYTES, MAX_LOG_LINES
from nightpress.core.service.jobs.queries import JobsWanted
from nightpress.core.service.jobs.records import Job, Worker, WorkerOffer
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.jobs import workers
from tests.jobs import GB, add_model, age, claim, new_job, submit, succeeded


def pages(store: JobStore, *, limit: int) -> Iterator[list[Job]]:
    cursor = None
    while True:
        page, cursor = store.reader.page("default", cursor=cursor, limit=limit)
        yield page
        if cursor is None:
            return


@pytest.mark.parametrize("limit", [1, 3, 7, 50])
def test_pages_show_each_job_once_newest_first_while_others_come_in(store: JobStore, limit: int):
    there = [submit(store) for _ in range(7)]
    submit(store, tenant_id="another")
    seen = []
    for page in pages(store, limit=limit):
        assert len(page) <= limit
        seen += [job.id for job in page]
        submit(store)
    assert [job_id for job_id in seen if job_id in there] == there[::-1]
    assert len(set(seen)) == len(seen)


def test_the_last_full_page_says_that_it_is_the_last(store: JobStore):
    for _ in range(4):
        submit(store)
    assert [len(page) for page in pages(store, limit=2)] == [2, 2]


def test_filters_by_state_label_and_model(store: JobStore, engine: Engine):
    add_model(engine, "model_other")
    plain = submit(store)
    time.sleep(0.002)  # SQLite's clock counts milliseconds
    labelled = submit(store, labels={"team": "search", "env": "prod"}, model_id="model_other", model_name="other")
    half = submit(store, labels={"team": "search"})
    store.requests.request_cancel("default", half)

    def found(**filters: Any) -> list[str]:
        return [job.id for job in store.reader.page("default", JobsWanted(**filters))[0]]

    assert found(labels={"team": "search"}) == [half, labelled]
    assert found(labels={"team": "search", "env": "prod"}) == [labelled]
    assert found(labels={"team": "sea"}) == []
    assert found(labels={'te"am': "' OR 1=1"}) == []
    assert found(states=["queued"]) == [labelled, plain]
    assert found(states=["cancelled", "running"]) == [half]
    assert found(model="model_other") == found(model="other") == [labelled]
    assert found(model="model_other", states=["running"]) == []
    assert found(queue="cpu") == [half, labelled, plain]
    assert found(queue="gpu") == []
    moment = next(job.created_at for job in store.reader.page("default")[0] if job.id == labelled)
    assert found(created_after=moment) == [half, labelled]
    assert found(created_before=moment) == [plain]


def test_what_matches_is_cancelled_and_no_more_at_once_than_is_asked(store: JobStore):
    mine = [submit(store, labels={"suite": "nightly"}) for _ in range(3)]
    other = submit(store)
    claimed = store.claims.claim(WorkerOffer("w", "cpu", "cpu", 1 << 40, 1), ttl_s=60)
    assert claimed is not None
    assert claimed.job.id == mine[0]
    wanted = JobsWanted(labels={"suite": "nightly"})
    assert store.requests.cancel_all("stranger", wanted) == (0, False)
    assert store.requests.cancel_all("default", wanted, limit=2) == (2, True)
    states = {job.id: job.state for job in store.reader.page("default")[0]}
    assert [states[job_id] for job_id in (*mine, other)] == ["running", "cancelled", "cancelled", "queued"]
    assert store.requests.cancel_all("default", wanted) == (1, False)
    assert store.requests.cancel_all("default", wanted) == (0, False)
    assert store.reader.get("default", mine[0]).state == "cancelling"


def test_a_batch_is_queued_whole_or_not_at_all(store: JobStore):
    made = store.submission.submit_all([new_job(name="a"), new_job(name="b")], max_queued=3)
    assert [job.name for job in made] == ["a", "b"]
    assert made == [store.reader.get("default", job.id) for job in made]
    assert [event.kind for event in store.reader.events(made[1].id)] == ["queued"]
    with pytest.raises(NightpressError) as refused:
        store.submission.submit_all([new_job(), new_job()], max_queued=3)
    assert refused.value.code is ErrorCode.QUOTA_EXCEEDED
    assert len(store.reader.page("default")[0]) == 2


def test_a_made_up_cursor_is_refused(store: JobStore):
    for cursor in ("", "x", "bm90IGpzb24", "WzEsMl0", "W10", "é", "WyIyMDI2LTAxLTAxIiwgImEiXQ", "====", "MQ"):
        with pytest.raises(NightpressError) as raised:
            store.reader.page("default", cursor=cursor)
        assert raised.value.code is ErrorCode.INVALID_REQUEST


def test_events_go_on_after_a_number(store: JobStore):
    job_id = submit(store)
    lease = claim(store).lease
    for step in range(5):
        assert store.attempts.record_event(lease, "checkpoint", {"step": step})
    assert [event.seq for event in store.reader.events(job_id, after=3, limit=2)] == [4, 5]
    assert store.reader.events(job_id, after=7) == []


def test_log_lines_are_numbered_over_attempts_and_cut(store: JobStore):
    job_id = submit(store)
    lease = claim(store).lease
    store.attempts.append_logs(lease, [("info", "one"), ("error", "ä" * MAX_LOG_BYTES + "\0")])
    store.attempts.release(lease)
    store.attempts.append_logs(claim(store).lease, [("info", "nul \0 and half \ud83d")])
    store.attempts.append_logs(lease, [])
    lines = store.reader.logs(job_id)
    assert [(line.seq, line.attempt, line.level) for line in lines] == [(1, 1, "info"), (2, 1, "error"), (3, 2, "info")]
    assert lines[1].text == "ä" * (MAX_LOG_BYTES // 2)
    assert lines[2].text == "nul \ufffd and half ?"
    assert [line.seq for line in store.reader.logs(job_id, after=1, limit=1)] == [2]


@pytest.mark.slow
def test_a_job_that_talks_without_end_fills_no_database(store: JobStore):
    job_id = submit(store)
    lease = claim(store).lease
    batch = [("info", "again")] * (MAX_LOG_LINES // 4 + 7)
    for _ in range(5):
        assert store.attempts.append_logs(lease, batch), "a full log is no reason to stop a job"
    last = store.reader.logs(job_id, after=MAX_LOG_LINES - 2)
    assert [line.seq for line in last] == [MAX_LOG_LINES - 1, MAX_LOG_LINES]
    assert "full" in last[-1].text


def test_workers_are_idle_busy_draining_or_lost(store: JobStore, engine: Engine):
    def announce(worker_id: str, *, draining: bool = False) -> None:
        store.roster.heartbeat_worker(Worker(worker_id, "host", "cpu", "cpu", 8 * GB, 2, "0.1.0", draining=draining))

    for worker_id in ("a", "b", "c", "d"):
        announce(worker_id)
    job_id = submit(store)
    claim(store, "b")
    announce("c", draining=True)
    with transaction(engine) as connection:
        connection.execute(update(workers).where(workers.c.id == "d").values(last_seen_at=db_now(-100)))
    assert [(worker.id, worker.state, worker.job_ids) for worker in store.roster.workers()] == [
        ("a", "idle", []),
        ("b", "busy", [job_id]),
        ("c", "draining", []),
        ("d", "lost", []),
    ]
    started = store.roster.workers()[0].started_at
    announce("a")
    assert store.roster.workers()[0].started_at == started
    assert store.roster.forget_workers(older_than_s=50) == 1
    store.roster.remove_worker("a")
    assert [worker.id for worker in store.roster.workers()] == ["b", "c"]
    assert [seat.queue for seat in store.roster.fleet().seats] == ["cpu"], "one kind, those that left among them"


def test_attempts_that_did_not_win_are_swept_once_and_late(store: JobStore, engine: Engine):
    job_id = submit(store)
    store.attempts.release(claim(store).lease)
    lease = claim(store).lease
    store.attempts.finish(lease, succeeded(lease))
    assert store.reader.abandoned_attempts(older_than_s=60) == []
    assert store.reader.abandoned_attempts(older_than_s=-60) == [(job_id, 1)]
    store.expiry.mark_swept(job_id, 1)
    assert store.reader.abandoned_attempts(older_than_s=-60) == []


def test_statistics_count_by_queue_state_and_error(store: JobStore, engine: Engine):
    failed = submit(store, max_failures=1)
    claim(store)
    age(engine, failed, 100, "lease_expires_at")
    store.expiry.expire_leases(backoff_s=1)
    submit(store, queue="gpu")
    running = submit(store)
    claim(store)
    waiting = submit(store)
    age(engine, waiting, 50, "created_at", "run_after")
    submit(store, run_after=dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
    figures = store.reader.statistics()
    assert running
    assert figures.jobs == {
        ("cpu", "failed"): 1,
        ("cpu", "queued"): 2,
        ("cpu", "running"): 1,
        ("gpu", "queued"): 1,
    }
    assert figures.failures == {"worker_lost": 1}
    assert 49 < figures.oldest_queued_s["cpu"] < 60
    assert figures.oldest_queued_s["gpu"] < 10
    assert store.reader.queues_with_work() == {"cpu": 1, "gpu": 1}
