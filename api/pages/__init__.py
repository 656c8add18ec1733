"""The web page: static files without a build step. They use `/v1` like any other client, and load nothing from other sites."""

from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

_STATIC = Path(__file__).parent / "static"
#: Only our own scripts and styles run, nothing is loaded from other sites, and no site can put the page into a frame.
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # browsers ask again with the ETag, so that a new release shows at once
}
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

router = APIRouter(include_in_schema=False)


class _File:
    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.etag = f'"{sha256(self.content).hexdigest()[:32]}"'
        self.media_type = _MEDIA_TYPES[path.suffix]


#: All files are read at the start. A name that is not in this table can reach no file.
_FILES = {path.relative_to(_STATIC).as_posix(): _File(path) for path in _STATIC.rglob("*") if path.is_file()}


@router.get("/")
async def index(request: Request) -> Response:
    return _answer(request, _FILES["index.html"])


@router.get("/docs")
async def reference(request: Request) -> Response:
    """The API's reference, shown by a page of our own: the usual viewers load scripts from other sites."""
    return _answer(request, _FILES["reference.html"])


@router.get("/static/{name:path}")
async def static(name: str, request: Request) -> Response:
    file = _FILES.get(name)
    return Response(status_code=404) if file is None else _answer(request, file)


def _answer(request: Request, file: _File) -> Response:
    headers = _HEADERS | {"ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
