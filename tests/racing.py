"""Lets several threads read a row before any of them can write it, so that only a guard decides between them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import Engine, Select, func, select, text

from nightpress.core.database import transaction
from tests.service import eventually

Answer = TypeVar("Answer")
_WAITING = select(func.count()).select_from(text("pg_locks")).where(text("NOT granted"))


def all_at_once(engine: Engine, row: Select[Any], work: Callable[[], Answer], number: int = 4) -> list[Answer]:
    """Do `work` in so many threads while another transaction holds the row that it writes. Returns what each answered.

    On SQLite, where writers exclude each other from the start, the threads simply queue up.
    """
    with ThreadPoolExecutor(number) as threads:
        with transaction(engine) as connection:
            connection.execute(row.with_for_update())
            begun = [threads.submit(work) for _ in range(number)]
            if engine.dialect.name == "postgresql":
                eventually(lambda: _count(engine) >= number, within=20)
        return [each.result() for each in begun]


def _count(engine: Engine) -> int:
    with transaction(engine, read_only=True) as connection:
        return int(connection.execute(_WAITING).scalar_one())
