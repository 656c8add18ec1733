"""Models: add by upload, from a source or from an allowed folder of the server; list, get, delete."""

from typing import Annotated

from fastapi import APIRouter, Body
from starlette.responses import Response

from nightpress.api.deps import ModelsReader, ModelsWriter, ServicesDep
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.routes.registered import add_registered_routes
from nightpress.core.errors import ErrorCode
from nightpress.core.recipes.possible import Possibility
from nightpress.core.wire.base import Page
from nightpress.core.wire.models import ModelCreate, ModelView

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=OnceRoute)

_SHA256 = "0f34e5a9d2a1c4b79e2c3f4f8f2f6a6e5d4c3b2a190817263544536271809fae"
_EXAMPLES = {
    "upload": {
        "summary": "Files that are sent afterwards, in parts",
        "value": {
            "name": "all-minilm-l6-v2",
            "files": [
                {"path": "config.json", "size": 612, "sha256": _SHA256},
                {"path": "model.safetensors", "size": 90868376, "sha256": _SHA256},
                {"path": "tokenizer.json", "size": 466247, "sha256": _SHA256},
            ],
        },
    },
    "from a bucket": {
        "summary": "Fetched from a bucket that the operator allowed",
        "value": {"name": "all-minilm-l6-v2", "source": "s3://models/released/all-minilm-l6-v2"},
    },
    "from the Hub": {
        "summary": "Fetched from the Hugging Face Hub, at the commit that the branch means now",
        "value": {"name": "all-minilm-l6-v2", "source": "hf://sentence-transformers/all-MiniLM-L6-v2@main"},
    },
    "server path": {
        "summary": "A folder on the server that the operator allowed",
        "value": {"name": "all-minilm-l6-v2", "path": "/srv/models/all-minilm-l6-v2"},
    },
}


@router.post(
    "",
    status_code=201,
    response_model=ModelView,
    summary="Announce a model",
    description=(
        "With `files`: send the parts that `uploads` lists, then POST `complete`. With `path`: the server reads the folder now; where it is "
        "large the state is `verifying`. With `source`: the state is `fetching`. Poll with GET until the state is `ready` or, with an `error`, `failed`."
    ),
    responses=documented(
        ErrorCode.INVALID_REQUEST,
        ErrorCode.UNSUPPORTED_FORMAT,
        ErrorCode.MALFORMED_MODEL,
        ErrorCode.PATH_NOT_ALLOWED,
        ErrorCode.PAYLOAD_TOO_LARGE,
        ErrorCode.STORAGE_UNAVAILABLE,
    ),
)
async def create_model(
    caller: ModelsWriter,
    services: ServicesDep,
    body: Annotated[ModelCreate, Body(openapi_examples=_EXAMPLES)],
) -> Response:
    model = await services.transfer(services.resources.models.create, caller.tenant_id, body)
    return answer(model, status=201, headers={"Location": f"/v1/models/{model.id}"})


@router.get(
    "/{reference}/possible",
    response_model=Page[Possibility],
    summary="Which passes and exports a model can have, and why not the others",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT),
)
async def get_possible(reference: str, caller: ModelsReader, services: ServicesDep) -> Response:
    found = await services.call(services.resources.models.possible, caller.tenant_id, reference)
    return answer(Page[Possibility](items=list(found)))


add_registered_routes(router, lambda services: services.resources.models, ModelView, "model")
