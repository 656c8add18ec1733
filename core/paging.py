"""Lists as pages: newest first by an identifier that sorts by the time it was made, so that nothing is skipped or repeated."""

from typing import Any

from sqlalchemy import Engine, Row, Select
from sqlalchemy.sql.elements import KeyedColumnElement

from core.database import transaction


def newest_first(
    engine: Engine, query: Select[Any], by: KeyedColumnElement[Any], *, cursor: str | None, limit: int
) -> tuple[list[Row[Any]], str | None]:
    """The rows of one page, and the cursor of the next, if there is one. `by` is among the query's columns and unique."""
    if cursor is not None:
        query = query.where(by < cursor)
    with transaction(engine, read_only=True) as connection:
        rows = list(connection.execute(query.order_by(by.desc()).limit(limit + 1)))
    page = rows[:limit]
    return page, str(page[-1]._mapping[by.key]) if len(rows) > limit else None
