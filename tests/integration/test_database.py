"""The database engine: its clock, its behaviour after the server has gone away, and the URLs that it accepts."""

import datetime as dt
from pathlib import Path

import pytest
from sqlalchemy import Engine, literal, select, text

from nightpress.core import database
from nightpress.core.database import db_now, make_engine, read_now, statement, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from tests.servers import Postgres


def test_the_databases_clock_is_aware_and_shifts(engine: Engine):
    with transaction(engine, read_only=True) as connection:
        now = read_now(connection)
        later, earlier, computed = connection.execute(
            select(db_now(90.5), db_now(-1e-3), db_now(literal(30) * 2))
        ).one()
    assert now.tzinfo is not None
    assert abs(now - dt.datetime.now(dt.UTC)) < dt.timedelta(seconds=10)
    assert abs((later - now).total_seconds() - 90.5) < 1
    assert abs((computed - now).total_seconds() - 60) < 1
    assert abs((earlier - now).total_seconds()) < 1


def test_a_datetime_without_a_zone_never_reaches_the_database(engine: Engine):
    naive = dt.datetime(2026, 1, 1)
    with pytest.raises(Exception, match="time zone"), transaction(engine) as connection:
        connection.execute(select(literal(naive, database.UtcDateTime)))


def test_an_error_undoes_the_transaction(engine: Engine):
    def break_off() -> None:
        with transaction(engine) as connection:
            connection.execute(text("DELETE FROM alembic_version"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    with statement(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar_one() == 1


def test_a_locked_sqlite_file_is_a_database_that_does_not_answer(sqlite_url: str, monkeypatch: pytest.MonkeyPatch):
    holder, other = make_engine(sqlite_url), make_engine(sqlite_url)
    with other.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 10")
    with transaction(holder), pytest.raises(NightpressError) as raised, transaction(other):
        pass
    assert raised.value.code is ErrorCode.DATABASE_UNAVAILABLE
    holder.dispose()
    other.dispose()


def test_other_databases_are_refused():
    with pytest.raises(NightpressError) as raised:
        make_engine("mysql://localhost/x")
    assert raised.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.slow
def test_a_restarted_server_costs_an_idle_process_nothing_and_a_busy_one_a_single_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with Postgres(tmp_path / "postgres") as server:
        engine = make_engine(server.url, pool_size=3)

        def ask() -> int:
            with transaction(engine, read_only=True) as connection:
                return connection.execute(select(literal(1))).scalar_one()

        def fill_pool() -> None:
            with engine.connect(), engine.connect(), engine.connect():
                pass

        fill_pool()
        server.kill()
        with pytest.raises(NightpressError) as raised:
            ask()
        assert raised.value.code is ErrorCode.DATABASE_UNAVAILABLE
        assert raised.value.kind.retryable
        server.start()
        assert [ask() for _ in range(5)] == [1] * 5, "one failure emptied the pool of what was dead"

        fill_pool()
        server.kill()
        server.start()
        monkeypatch.setattr(database, "_PING_AFTER_S", 0.0)
        assert [ask() for _ in range(5)] == [1] * 5, "a connection that lay idle is asked first"
        engine.dispose()
