"""The routes that models and data sets share: list, get, upload and delete."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from nightpress.api.deps import Cursor, Limit, ModelsReader, ModelsWriter, Services, ServicesDep
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.numbers import whole_number
from nightpress.core.wire.base import Page
from nightpress.core.wire.models import DataSetView, ModelView, UploadFile

_PIECE = 1024**2  #: bytes that are passed to the store's thread at a time


class Registry(Protocol):
    """What the registries of models and data sets share. `reference`: an id or a name."""

    def page(
        self, tenant_id: str, *, cursor: str | None, limit: int
    ) -> tuple[Sequence[ModelView | DataSetView], str | None]: ...

    def get(self, tenant_id: str, reference: str) -> ModelView | DataSetView: ...

    def uploads(self, tenant_id: str, reference: str) -> list[UploadFile]: ...

    def receive_part(
        self, tenant_id: str, reference: str, path: str, number: int, pieces: Iterator[bytes], size: int
    ) -> None: ...

    def complete(self, tenant_id: str, reference: str) -> ModelView | DataSetView: ...

    def delete(self, tenant_id: str, reference: str) -> None: ...


def add_registered_routes(
    router: APIRouter, registry: Callable[[Services], Registry], view: type[BaseModel], what: str
) -> None:
    """Add the shared routes to a router. `what`: "model" or "data set"."""
    noun = what.replace(" ", "_")

    @router.get(
        "",
        name=f"list_{noun}s",
        response_model=Page[view],  # type: ignore[valid-type]  # known only here
        summary=f"List {what}s, newest first",
    )
    async def page(caller: ModelsReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50) -> Response:
        items, following = await services.call(registry(services).page, caller.tenant_id, cursor=cursor, limit=limit)
        return answer(Page[Any](items=items, next_cursor=following))

    @router.get(
        "/{reference}",
        name=f"get_{noun}",
        response_model=view,
        summary=f"Get a {what} by id or name",
        responses=documented(ErrorCode.NOT_FOUND),
    )
    async def get(reference: str, caller: ModelsReader, services: ServicesDep) -> Response:
        return answer(await services.call(registry(services).get, caller.tenant_id, reference))

    @router.get(
        "/{reference}/uploads",
        name=f"list_{noun}_uploads",
        response_model=Page[UploadFile],
        summary="List the parts that are missing, with fresh addresses",
        responses=documented(ErrorCode.NOT_FOUND, ErrorCode.STORAGE_UNAVAILABLE),
    )
    async def uploads(reference: str, caller: ModelsWriter, services: ServicesDep) -> Response:
        files = await services.transfer(registry(services).uploads, caller.tenant_id, reference)
        return answer(Page[UploadFile](items=files))

    @router.put(
        "/{reference}/parts/{number}",
        name=f"send_{noun}_part",
        status_code=204,
        response_class=Response,
        summary="Send a part through the API",
        description="For parts whose address in `uploads` is here and not at the object storage. The body is the part's bytes.",
        responses=documented(
            ErrorCode.NOT_FOUND,
            ErrorCode.CONFLICT,
            ErrorCode.CHECKSUM_MISMATCH,
            ErrorCode.PAYLOAD_TOO_LARGE,
            ErrorCode.RATE_LIMITED,
            ErrorCode.STORAGE_UNAVAILABLE,
        ),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def receive_part(
        request: Request,
        reference: str,
        number: Annotated[int, Path(ge=1, le=10_000)],
        path: Annotated[str, Query(min_length=1, max_length=512, description="The file's announced path.")],
        caller: ModelsWriter,
        services: ServicesDep,
    ) -> Response:
        pieces = _pieces(request, asyncio.get_running_loop())
        size = _announced_size(request)
        receive = registry(services).receive_part
        await services.upload(caller, receive, caller.tenant_id, reference, path, number, pieces, size)
        return Response(status_code=204)

    @router.post(
        "/{reference}/complete",
        name=f"complete_{noun}",
        response_model=view,
        summary=f"Finish an upload: verify the files and make the {what} ready",
        description="202: the upload is large and its state is `verifying`. Poll `Location` with GET until the state is `ready` or, with an `error`, `failed`.",
        responses={
            202: {"model": view, "description": "The files are verified after this answer."},
            **documented(
                ErrorCode.NOT_FOUND,
                ErrorCode.CONFLICT,
                ErrorCode.CHECKSUM_MISMATCH,
                ErrorCode.MALFORMED_MODEL,
                ErrorCode.STORAGE_UNAVAILABLE,
            ),
        },
    )
    async def complete(reference: str, caller: ModelsWriter, services: ServicesDep) -> Response:
        made = await services.transfer(registry(services).complete, caller.tenant_id, reference)
        if made.state == "ready":
            return answer(made)
        return answer(made, status=202, headers={"Location": f"{router.prefix}/{made.id}"})

    @router.delete(
        "/{reference}",
        name=f"delete_{noun}",
        status_code=204,
        response_class=Response,
        summary=f"Delete a {what}, or abandon its upload",
        responses=documented(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT, ErrorCode.STORAGE_UNAVAILABLE),
    )
    async def delete(reference: str, caller: ModelsWriter, services: ServicesDep) -> Response:
        await services.transfer(registry(services).delete, caller.tenant_id, reference)
        return Response(status_code=204)


def _announced_size(request: Request) -> int:
    size = whole_number(request.headers.get("content-length", ""))
    if size is None:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST, "The part's length is unknown.", hint="Send it with a Content-Length header."
        )
    return size


def _pieces(request: Request, loop: asyncio.AbstractEventLoop) -> Iterator[bytes]:
    """The body, for use in a thread: each piece is requested from the event loop, so that only one piece is in memory."""
    chunks = request.stream()

    async def gather() -> bytes:
        piece = bytearray()
        async for chunk in chunks:
            piece += chunk
            if len(piece) >= _PIECE:
                break
        return bytes(piece)

    # A silent client is disconnected by api/connections.py, which ends this loop.
    while piece := asyncio.run_coroutine_threadsafe(gather(), loop).result():
        yield piece
