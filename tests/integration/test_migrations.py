"""The migrations: up, down and up again; the schema equals the code's tables; and the constraints of the database itself."""

from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from nightpress import migrations
from nightpress.core.database import make_engine, metadata, transaction
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.promotions.store import PromotionStore
from nightpress.migrations.__main__ import main
from tests.jobs import add_model, claim, new_job, submit, succeeded
from tests.servers import Postgres


@pytest.mark.slow
def test_up_down_and_up_again(sql_url: str, engine: Engine):
    tables = set(inspect(engine).get_table_names())
    assert {"jobs", "models", "api_keys"} <= tables
    migrations.downgrade(sql_url)
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    migrations.upgrade(sql_url)
    migrations.upgrade(sql_url)
    assert set(inspect(engine).get_table_names()) == tables


def test_the_tables_in_code_and_in_the_database_are_the_same(sql_url: str):
    migrations.check(sql_url)


def test_the_constraints_have_the_names_that_the_code_gives_them(engine: Engine):
    for table in metadata.tables.values():
        there = {
            get_check_constraint["name"] for get_check_constraint in inspect(engine).get_check_constraints(table.name)
        }
        assert there == {
            constraint.name for constraint in table.constraints if str(constraint.name).startswith("ck_")
        }, table.name


def test_there_is_one_line_of_revisions():
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert len(ScriptDirectory.from_config(config).get_heads()) == 1


BROKEN = (
    "state = 'paused'",
    "state = 'queued'",
    "lease_id = NULL, lease_expires_at = NULL",
    "lease_expires_at = NULL",
    "state = 'succeeded', verdict = 'accepted', lease_id = NULL, lease_expires_at = NULL",
    "verdict = 'accepted'",
    "error = '{}', error_code = 'internal'",
    "failures = 4",
    "progress = 1.5",
    "queue = 'tpu'",
    "model_id = 'model_gone'",
)


def test_the_database_itself_refuses_what_the_store_never_writes(engine: Engine):
    add_model(engine)
    store = JobStore(engine)
    submit(store)
    claim(store)
    for change in BROKEN:
        with pytest.raises(DBAPIError, match=r"(?i)constraint"), transaction(engine) as connection:
            connection.execute(text(f"UPDATE jobs SET {change}"))


@pytest.mark.slow
def test_python_dash_m_migrations(sql_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NIGHTPRESS_DATABASE_URL", sql_url)
    for action in ("check", "downgrade", "upgrade"):
        monkeypatch.setattr("sys.argv", ["migrations", action])
        main()
    assert "jobs" in inspect(engine).get_table_names()


@pytest.mark.slow
def test_a_migration_gives_up_on_a_locked_table_instead_of_queueing_everybody_behind_it(postgres_server: Postgres):
    url = postgres_server.create_database()
    migrations.upgrade(url)
    engine = make_engine(url)
    with engine.connect() as holder:
        holder.execute(text("LOCK TABLE job_logs IN ACCESS SHARE MODE"))
        with pytest.raises(DBAPIError, match="lock timeout"):
            migrations.downgrade(url)
    assert "jobs" in inspect(engine).get_table_names()
    engine.dispose()


@pytest.mark.slow
def test_a_fingerprint_that_cannot_be_trusted_is_forgotten_and_what_came_of_it_is_taken_back(
    sql_url: str, engine: Engine
):
    """Before 0013, a job with an idempotency key got the result of the last job with the same request, even if the model had changed."""
    add_model(engine)
    store = JobStore(engine)
    mine = {"fingerprint": "f" * 64, "priority": 1}
    night = store.submission.submit(new_job(**mine), max_queued=10)[0]
    lease = claim(store).lease
    assert store.attempts.finish(lease, succeeded(lease))
    same = store.requests.reuse(store.submission.submit(new_job(**mine), max_queued=10)[0])
    other_weights = {**mine, "model_digest": "sha256:" + "1" * 64}
    wrong = store.requests.reuse(store.submission.submit(new_job(**other_weights), max_queued=10)[0])
    assert same.reused_from == wrong.reused_from == night.id
    assert PromotionStore(engine).latest("default", "tiny").job_id == wrong.id
    migrations.downgrade(sql_url, "0012")
    migrations.upgrade(sql_url)
    assert PromotionStore(engine).latest("default", "tiny").job_id == same.id
    assert [bool(store.reader.artifacts(job.id)) for job in (night, same, wrong)] == [True, True, False]
    again = store.submission.submit(new_job(**mine), max_queued=10)[0]
    assert store.requests.reuse(again) == again, "it runs: nothing is known of what is older"
    lease = claim(store).lease
    assert store.attempts.finish(lease, succeeded(lease))
    assert store.requests.reuse(store.submission.submit(new_job(**mine), max_queued=10)[0]).reused_from == again.id
