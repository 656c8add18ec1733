"""Lists in pages, newest first by the database's time. The identifier only orders rows that have the same time."""

import base64
import binascii
import datetime as dt
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine, Row, Select, literal, tuple_
from sqlalchemy.sql.elements import KeyedColumnElement

from nightpress.core.database import UtcDateTime, clean_text, transaction
from nightpress.core.errors import ErrorCode, NightpressError

Order = Sequence[KeyedColumnElement[Any]]


def newest_first(
    engine: Engine, query: Select[Any], *order: KeyedColumnElement[Any], cursor: str | None, limit: int
) -> tuple[list[Row[Any]], str | None]:
    """The rows of one page, and the cursor of the next page or None.

    `order`: columns of the query to sort by, the most significant first; together they must be unique. Rows that are inserted between
    two calls cause no row to be skipped or repeated. Raises NightpressError(invalid_request) for a cursor that this service did not make.
    """
    if cursor is not None:
        last = zip(order, _read_cursor(cursor, order), strict=True)
        query = query.where(tuple_(*order) < tuple_(*(literal(value, column.type) for column, value in last)))
    with transaction(engine, read_only=True) as connection:
        rows = list(connection.execute(query.order_by(*(column.desc() for column in order)).limit(limit + 1)))
    page = rows[:limit]
    if len(rows) <= limit:
        return page, None
    return page, cursor_after(*(page[-1]._mapping[column.key] for column in order))


def cursor_after(*values: dt.datetime | str) -> str:
    """The cursor of the page that begins after a row. `values`: the row's values in the columns of the order."""
    told = [value.isoformat() if isinstance(value, dt.datetime) else value for value in values]
    return base64.urlsafe_b64encode(json.dumps(told).encode()).decode().rstrip("=")


def _read_cursor(cursor: str, order: Order) -> list[dt.datetime | str]:
    try:
        told = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if not isinstance(told, list) or not all(isinstance(text, str) and clean_text(text) == text for text in told):
            raise ValueError("not a cursor")
        return [
            _read_moment(text) if isinstance(column.type, UtcDateTime) else text
            for column, text in zip(order, told, strict=True)
        ]
    except (ValueError, TypeError, OverflowError, RecursionError, binascii.Error) as error:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            "The cursor is not one that this service gave out.",
            hint="Start again without a cursor.",
        ) from error


def _read_moment(text: str) -> dt.datetime:
    moment = dt.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("not a cursor")
    return moment.astimezone(dt.UTC)
