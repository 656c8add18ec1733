"""The routes, one file per resource. A route reads the request, calls a service in a thread and writes the answer. It has no SQL."""

from pydantic import BaseModel
from starlette.responses import Response


def answer(body: BaseModel, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with a model as JSON. The model was validated when it was made, so FastAPI need not validate it again."""
    return Response(body.model_dump_json(), status_code=status, headers=headers, media_type="application/json")
