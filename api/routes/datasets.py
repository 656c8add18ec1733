"""Data sets: text or labelled rows for calibration and evaluation."""

from typing import Annotated

from fastapi import APIRouter, Body
from starlette.responses import Response

from nightpress.api.deps import ModelsWriter, ServicesDep
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.routes.registered import add_registered_routes
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.models import DataSetCreate, DataSetView

router = APIRouter(prefix="/v1/datasets", tags=["data sets"], route_class=OnceRoute)

_SHA256 = "0f34e5a9d2a1c4b79e2c3f4f8f2f6a6e5d4c3b2a190817263544536271809fae"
_EXAMPLES = {
    "upload": {
        "summary": "A file that is sent afterwards, in parts",
        "value": {"name": "reviews", "file": {"path": "reviews.jsonl.gz", "size": 482113, "sha256": _SHA256}},
    },
    "from a bucket": {
        "summary": "Fetched from a bucket that the operator allowed",
        "value": {"name": "reviews", "source": "s3://data/reviews.jsonl.gz"},
    },
    "split of the Hub": {
        "summary": "The columns of a split, fetched from a data set repository of the Hugging Face Hub",
        "value": {
            "name": "reviews",
            "source": "hf://datasets/acme/reviews@main?split=test&columns=text:sentence,label",
        },
    },
    "server path": {
        "summary": "A file on the server that the operator allowed",
        "value": {"name": "reviews", "path": "/srv/data/reviews.jsonl"},
    },
}


@router.post(
    "",
    status_code=201,
    response_model=DataSetView,
    summary="Announce a data set",
    description=(
        "With `file`: send the parts that `uploads` lists, then POST `complete`. With `path`: the server reads the file now; where it is "
        "large the state is `verifying`. With `source`: the state is `fetching`. Poll with GET until the state is `ready` or, with an `error`, `failed`."
    ),
    responses=documented(
        ErrorCode.INVALID_REQUEST,
        ErrorCode.UNSUPPORTED_FORMAT,
        ErrorCode.INVALID_DATA,
        ErrorCode.PATH_NOT_ALLOWED,
        ErrorCode.PAYLOAD_TOO_LARGE,
        ErrorCode.STORAGE_UNAVAILABLE,
    ),
)
async def create_data_set(
    caller: ModelsWriter,
    services: ServicesDep,
    body: Annotated[DataSetCreate, Body(openapi_examples=_EXAMPLES)],
) -> Response:
    data_set = await services.transfer(services.resources.datasets.create, caller.tenant_id, body)
    return answer(data_set, status=201, headers={"Location": f"/v1/datasets/{data_set.id}"})


add_registered_routes(router, lambda services: services.resources.datasets, DataSetView, "data set")
