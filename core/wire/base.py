"""The bases of all shapes on the wire: requests, which refuse unknown fields, views, pages and problems."""

import datetime as dt
import re
from typing import Annotated, Any, Generic, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from nightpress.core.recipes.jsonfile import is_text

Item = TypeVar("Item")
ONE_LINE = r"^[^\x00-\x1f\x7f]*$"  #: names go into logs, terminals and headers: no line breaks, no escapes
MAX_S = 366 * 24 * 3600.0
Labels = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]{1,63}$")],
        Annotated[str, Field(max_length=256, pattern=ONE_LINE)],
    ],
    Field(max_length=32),
]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


_MAX_VALUES = 50_000  #: of one body: a hundred jobs with recipes of their own have a tenth of that
_MAX_DEPTH = 48


def _flaw(raw: object) -> str | None:
    """Why a body is refused before it is validated: text that no database stores, or too many values. Cheap for any input."""
    left = _MAX_VALUES
    level = [raw]
    for _ in range(_MAX_DEPTH):
        left -= len(level)
        below: list[object] = []
        for value in level:
            if isinstance(value, str):
                if not is_text(value):
                    return "a NUL character or half a surrogate pair is not allowed"
            elif isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            if len(below) > left:
                return f"has more than {_MAX_VALUES} values"
        if not below:
            return None
        level = below
    return "is nested too deeply"


class Request(BaseModel):
    """What a caller sends. Unknown fields are an error, and `true` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and (why := _flaw(raw)) is not None:
            raise ValueError(why)
        return raw


def _written_as_a_time(raw: object) -> object:
    # pydantic would take 0.5 for half a second past 1970
    if isinstance(raw, dt.datetime) or (isinstance(raw, str) and re.match(r"\d{4}-\d\d-\d\d", raw)):
        return raw
    raise ValueError("must be a time with its zone, such as 2026-11-24T01:00:00Z")


def _near(moment: dt.datetime) -> dt.datetime:
    if not 2000 <= moment.year <= 2200:
        raise ValueError("must lie between the years 2000 and 2200")
    return moment


#: JSON has no time of its own: it comes as text
Moment = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_written_as_a_time), AfterValidator(_near)]


class View(BaseModel):
    """What a caller gets. A client ignores fields it doesn't know, so that a newer server may add some."""

    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)


class Page(View, Generic[Item]):
    items: list[Item]
    next_cursor: str | None = None


class Problem(View):
    """RFC 9457, with our code, what to do, and the request to quote when asking for help."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str = ""
    instance: str = ""
    request_id: str = ""
    errors: list[dict[str, Any]] = []
