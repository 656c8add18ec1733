"""The numbered lines of a job or a study, as a page or as a stream that a reader can resume."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Query, Request
from starlette.responses import Response

from nightpress.api import sse
from nightpress.api.deps import Services
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.base import Page

After = Annotated[int, Query(ge=0, le=10**15, description="Only lines whose `seq` is greater.")]
Lines = Annotated[int, Query(ge=1, le=1000)]


def documented_lines(subject: str) -> dict[int | str, dict[str, Any]]:
    """What a route with lines answers, for the OpenAPI document. `subject`: "job" or "study"."""
    return {
        200: {
            "description": "With `Accept: text/event-stream`: an SSE message for each line, with its `seq` as the id, "
            f"until the {subject} has ended. `Last-Event-ID` resumes.",
            "content": {sse.MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        204: {
            "description": f"To a request for a stream: the {subject} has ended and the reader has received everything."
        },
        **documented(ErrorCode.NOT_FOUND, ErrorCode.INVALID_REQUEST),
    }


async def page_or_stream(
    request: Request,
    services: Services,
    subject: sse.Subject,
    kind: sse.LineKind[sse.Line],
    read: Callable[..., Sequence[sse.Line]],
    *,
    after: int,
    limit: int,
) -> Response:
    """The lines after number `after`: a stream if the caller asks for one, else at most `limit` lines. `read` reads them from SQL."""
    if sse.wants_stream(request):
        return await sse.stream(request, services, subject, kind, read, after=sse.resume_point(request, after))
    found = await services.call(read, subject.id, after=after, limit=limit)
    following = str(found[-1].seq) if len(found) == limit else None
    return answer(Page[Any](items=[kind.shown(line) for line in found], next_cursor=following))
