"""The standing destinations of a model's name: where each result goes that becomes its latest."""

from fastapi import APIRouter
from starlette.responses import Response

from nightpress.api.deps import DeliveriesReader, DeliveriesWriter, ServicesDep
from nightpress.api.problems import documented
from nightpress.api.versions import IfMatch, answer_version, version_of
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.deliveries import ModelDestinations, ModelDestinationsView

router = APIRouter(prefix="/v1/models/{reference}/destinations", tags=["deliveries"])


@router.get(
    "",
    response_model=ModelDestinationsView,
    summary="Get where a model's latest results are delivered to",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def get_destinations(reference: str, caller: DeliveriesReader, services: ServicesDep) -> Response:
    name = (await services.call(services.resources.models.get, caller.tenant_id, reference)).name
    return answer_version(await services.call(services.resources.model_destinations.get, caller.tenant_id, name))


@router.put(
    "",
    response_model=ModelDestinationsView,
    summary="Set where a model's latest results are delivered to",
    description="From the next result on that becomes the latest of the name. An empty list ends it.",
    responses=documented(
        ErrorCode.NOT_FOUND, ErrorCode.INVALID_REQUEST, ErrorCode.PATH_NOT_ALLOWED, ErrorCode.PRECONDITION_FAILED
    ),
)
async def set_destinations(
    reference: str, caller: DeliveriesWriter, services: ServicesDep, body: ModelDestinations, if_match: IfMatch = None
) -> Response:
    version = version_of(if_match)
    name = (await services.call(services.resources.models.get, caller.tenant_id, reference)).name
    store = services.resources.model_destinations
    now = await services.call(
        store.set, caller.tenant_id, name, body.destinations, version=version, key_id=caller.key_id
    )
    return answer_version(now)
