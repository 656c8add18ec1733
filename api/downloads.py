"""Downloads: a redirect to a presigned URL if the store can make one, else a stream that supports ranges."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import PurePosixPath
from urllib.parse import quote

from fastapi import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from nightpress.api.deps import Services
from nightpress.api.problems import problem
from nightpress.core.errors import ErrorCode, NightpressError

#: A script in a browser may not follow a redirect to another origin. With this media type it requests the address instead.
LOCATION_TYPE = "application/vnd.nightpress.location+json"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


async def send_object(request: Request, services: Services, key: str, *, path: str, size: int, sha256: str) -> Response:
    """The response with a stored file. `path`: its last part names the download. `size`: bytes of the file.

    The SHA-256 is the ETag, so that a resumed download can't mix versions.
    """
    filename = safe_filename(path)
    url = await services.call(services.resources.objects.presign_get, key, filename=filename)
    if url is not None and LOCATION_TYPE in request.headers.get("accept", ""):
        return JSONResponse({"url": url}, media_type=LOCATION_TYPE, headers={"Cache-Control": "no-store"})
    if url is not None:
        return RedirectResponse(url, status_code=307, headers={"Cache-Control": "no-store"})
    etag = f'"{sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f"attachment; filename=\"{filename}\"; filename*=UTF-8''{quote(PurePosixPath(path).name)}",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    wanted = _wanted_range(request, etag, size)
    if wanted is None:
        return _unsatisfiable(request, size)
    start, end, partial = wanted
    headers["Content-Length"] = str(end - start)
    if partial:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    chunks = await services.call(_opened, services, key, start, end)
    return StreamingResponse(
        chunks, status_code=206 if partial else 200, headers=headers, media_type="application/octet-stream"
    )


def safe_filename(path: str) -> str:
    """The last part of a path as plain ASCII without quotes, separators or control characters."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(path).name).lstrip(".")
    return name or "file"


def _opened(services: Services, key: str, start: int, end: int) -> Iterator[bytes]:
    """The chunks of [start, end). The first is read now: a store that fails must lead to a problem response, not to a cut connection."""
    if start == end:
        return iter(())
    chunks = iter(services.resources.objects.read(key, start, end))
    return chain([next(chunks)], chunks)


def _wanted_range(request: Request, etag: str, size: int) -> tuple[int, int, bool] | None:
    """The bytes [start, end) to send and whether they are a part of the file, or None if the range is outside the file.

    Several ranges, an invalid one, or a range of another version get the whole file (RFC 9110 §14.2).
    """
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or match.groups() == ("", "") or request.headers.get("if-range", etag) != etag:
        return 0, size, False
    first, last = match.groups()
    if not first:  # `-N`: the last N bytes
        return (max(0, size - int(last)), size, True) if int(last) and size else None
    start = int(first)
    if last and int(last) < start:
        return 0, size, False
    return (start, min(int(last) + 1, size) if last else size, True) if start < size else None


def _unsatisfiable(request: Request, size: int) -> Response:
    return problem(
        NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"The file has {size} bytes; the range begins after its end.",
            hint="If the file is already complete, verify its SHA-256 instead.",
        ),
        request,
        status=416,
        headers={"Content-Range": f"bytes */{size}"},
    )
