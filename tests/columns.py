"""Compares whole rows column by column, for tests/integration/test_columns_*.py."""

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Engine, Table, select

from nightpress.core.database import read_now, transaction

Row = Mapping[str, Any]
A_MINUTE = dt.timedelta(minutes=1)
#: the other columns of a job that no worker has claimed yet
UNTOUCHED: dict[str, Any] = {
    "state": "queued",
    "verdict": None,
    "phase": None,
    "progress": 0.0,
    "pass_index": None,
    "eta_s": None,
    "message": "",
    "reused_from": None,
    "engine": None,
    "artifacts_state": "kept",
    "attempt": 0,
    "failures": 0,
    "error": None,
    "error_code": None,
    "held_by": None,
    "held_until": None,
    "worker_id": None,
    "lease_id": None,
    "lease_expires_at": None,
    "started_at": None,
    "progressed_at": None,
    "finished_at": None,
    "event_seq": 1,
    "log_seq": 0,
}
#: columns that may have another column's value: small numbers and times
JOB_ALIKE = frozenset({"event_seq", "attempt", "failures", "log_seq", "progress", "needs_gpus"})


class Chosen:
    """Equal to every value that `is_right` accepts: for values that the code under test chooses, such as identifiers and times."""

    def __init__(self, says: str, is_right: Callable[[Any], bool]) -> None:
        self._says = says
        self._is_right = is_right

    def __eq__(self, other: object) -> bool:
        return self._is_right(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self._says


DIGEST = Chosen("<digest>", lambda value: isinstance(value, str) and value.startswith("sha256:"))
WORDS = Chosen("<words>", lambda value: isinstance(value, str) and bool(value))
MAPPING = Chosen("<mapping>", lambda value: isinstance(value, dict) and bool(value))


def identifier(prefix: str) -> Any:
    return Chosen(f"<{prefix}_…>", lambda value: isinstance(value, str) and value.startswith(f"{prefix}_"))


def whole_id(size: int) -> Any:
    return Chosen(f"<{size} characters>", lambda value: isinstance(value, str) and len(value) == size)


def about(moment: dt.datetime) -> Any:
    return Chosen(f"<about {moment}>", lambda value: isinstance(value, dt.datetime) and abs(value - moment) < A_MINUTE)


class Rows:
    """Compares whole rows, and remembers which columns had a value in some row."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen: dict[str, set[str]] = {}
        with transaction(engine, read_only=True) as connection:
            self.now = about(read_now(connection))

    def after(self, seconds: float) -> Any:
        with transaction(self.engine, read_only=True) as connection:
            return about(read_now(connection) + dt.timedelta(seconds=seconds))

    def check(
        self, table: Table, expected: Row, *which: ColumnElement[bool], alike: frozenset[str] = frozenset()
    ) -> Row:
        """Compare the row that `which` selects with the expected one, and return it.

        Every expected value must be different, so that no column can take another's value unnoticed. `alike`: columns exempt from this.
        """
        assert set(expected) == set(table.c.keys()), "say here what every column of the table holds"
        plain = [
            value
            for name, value in expected.items()
            if not isinstance(value, Chosen | bool) and value not in (None, [], {}) and name not in alike
        ]
        assert all(plain.count(value) == 1 for value in plain), "each column needs a value of its own"
        with transaction(self.engine, read_only=True) as connection:
            row = dict(connection.execute(select(table).where(*which)).mappings().one())
        other = {name: (value, expected[name]) for name, value in row.items() if expected[name] != value}
        assert not other, f"{table.name}: found and expected differ: {other}"
        self.seen.setdefault(table.name, set()).update(name for name, value in row.items() if value is not None)
        return row

    def all_seen(self, *tables: Table) -> None:
        """Check that every column of the tables had a value in at least one compared row."""
        for table in tables:
            assert set(table.c.keys()) - self.seen[table.name] == set(), f"no row of {table.name} had a value in these"
