"""A worker's log lines and events while the database is unavailable."""

import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

import nightpress.worker.lease
from nightpress.core.database import make_engine
from nightpress.core.service.jobs.store import JobStore
from nightpress.worker.lease import LeaseKeeper
from tests.databases import migrated_postgres
from tests.jobs import add_model, claim, submit
from tests.servers import Postgres
from tests.service import eventually

KEPT = 50
TTL_S = 40.0


@pytest.fixture
def engine(postgres_server: Postgres) -> Iterator[Engine]:
    engine = make_engine(migrated_postgres(postgres_server))
    add_model(engine)
    yield engine
    engine.dispose()


def somebody_waits(engine: Engine) -> bool:
    waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with engine.connect() as connection:
        return bool(connection.execute(text(waits)).scalar_one())


@pytest.mark.slow
def test_the_newest_lines_of_a_log_are_kept_in_their_order(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that could not be written stay before the lines that came meanwhile. If there are too many, the oldest are dropped."""
    monkeypatch.setattr(nightpress.worker.lease, "_LOG_LINES", KEPT)
    store = JobStore(engine)
    submit(store)
    lease = claim(store, ttl_s=TTL_S).lease
    keeper = LeaseKeeper(store, lease, ttl_s=TTL_S, claimed_at=time.monotonic(), on_renewed=lambda: None)
    lines = [f"line {number}" for number in range(80)]
    with engine.connect() as holder, holder.begin():
        holder.execute(text("LOCK TABLE job_logs IN ACCESS EXCLUSIVE MODE"))
        for line in lines[:40]:
            keeper.log_line("info", line)
        eventually(lambda: somebody_waits(engine))  # the keeper is writing the first forty lines
        for line in lines[40:]:
            keeper.log_line("info", line)
        holder.execute(text("ALTER TABLE job_logs RENAME TO away"))
    eventually(lambda: not somebody_waits(engine))
    time.sleep(0.3)  # the write fails
    with engine.connect() as connection, connection.begin():
        connection.execute(text("ALTER TABLE away RENAME TO job_logs"))
    keeper.close()
    assert [line.text for line in store.reader.logs(lease.job_id)] == lines[-KEPT:]


def test_lines_are_stored_before_the_checkpoint_that_followed_them(engine: Engine) -> None:
    """A reader of the checkpoint's event may kill this worker, so the log before it must already be stored."""
    store = JobStore(engine)
    submit(store)
    lease = claim(store, ttl_s=TTL_S).lease
    keeper = LeaseKeeper(store, lease, ttl_s=TTL_S, claimed_at=time.monotonic(), on_renewed=lambda: None)
    with engine.connect() as holder, holder.begin():
        holder.execute(text("LOCK TABLE job_events IN ACCESS EXCLUSIVE MODE"))
        keeper.log_line("info", "step 1")
        keeper.note("checkpoint", {"step": 1})
        eventually(lambda: somebody_waits(engine))
        assert [line.text for line in store.reader.logs(lease.job_id)] == ["step 1"]
    keeper.close()
    assert [event.data for event in store.reader.events(lease.job_id) if event.kind == "checkpoint"] == [{"step": 1}]
