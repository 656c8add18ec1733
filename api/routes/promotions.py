"""The latest accepted result of a model's name, which deployments follow, and how to go back to an earlier result."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from nightpress.api.deps import Cursor, FeedReader, Limit, ModelsReader, ModelsWriter, Services, ServicesDep
from nightpress.api.feeds import MEDIA_TYPE, promotions_feed
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.routes.results import artifact_view
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.wire.base import Page
from nightpress.core.wire.promotions import LatestView, PromotionCreate, PromotionView

router = APIRouter(prefix="/v1/models/{reference}", tags=["models"], route_class=OnceRoute)


@router.get(
    "/latest",
    response_model=LatestView,
    summary="Get the latest accepted result of a model's name",
    description="It changes in the transaction that accepts a job, and its ETag with it. `If-None-Match` is answered with 304 while it is the same.",
    responses={304: {"description": "The latest result is still the same."}, **documented(ErrorCode.NOT_FOUND)},
)
async def latest(request: Request, reference: str, caller: ModelsReader, services: ServicesDep) -> Response:
    promotion = await services.call(_latest, services, caller.tenant_id, reference)
    artifacts = await services.call(services.resources.store.reader.artifacts, promotion.job_id)
    view = LatestView(
        promotion=promotion,
        artifacts=[artifact_view(promotion.job_id, artifact, signed=True) for artifact in artifacts],
    )
    etag = f'"{promotion.id}"'
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"ETag": etag})
    return answer(view, headers={"ETag": etag})


@router.get(
    "/promotions",
    response_model=Page[PromotionView],
    summary="List the results that a model's name has meant, newest first",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def history(
    reference: str, caller: ModelsReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    promotion = await services.call(_latest, services, caller.tenant_id, reference)
    items, following = await services.call(
        services.resources.promotions.page, caller.tenant_id, promotion.model_name, cursor=cursor, limit=limit
    )
    return answer(Page[PromotionView](items=items, next_cursor=following))


@router.get(
    "/promotions.atom",
    response_class=Response,
    summary="Get the last fifty promotions of a model's name as an Atom feed",
    description="A feed reader may send the key as the password of HTTP's basic authentication, with any user name.",
    responses={
        200: {"content": {MEDIA_TYPE: {}}},
        304: {"description": "No newer promotion."},
        **documented(ErrorCode.NOT_FOUND),
    },
)
async def promotions_atom(request: Request, reference: str, caller: FeedReader, services: ServicesDep) -> Response:
    newest = await services.call(_latest, services, caller.tenant_id, reference)
    headers = {"ETag": f'"{newest.id}"', "Cache-Control": "private, no-cache"}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    items, _ = await services.call(
        services.resources.promotions.page, caller.tenant_id, newest.model_name, cursor=None, limit=50
    )
    feed = promotions_feed(newest.model_name, items, services.resources.settings.public_url)
    return Response(feed, media_type=MEDIA_TYPE, headers=headers)


@router.post(
    "/promotions",
    status_code=201,
    response_model=PromotionView,
    summary="Let a model's name mean another job's result, e.g. to go back",
    description="The next accepted result replaces it.",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT, ErrorCode.INVALID_REQUEST),
)
async def promote(reference: str, caller: ModelsWriter, services: ServicesDep, body: PromotionCreate) -> Response:
    name = await services.call(_name_of, services, caller.tenant_id, reference)
    made = await services.call(
        services.resources.promotions.promote, caller.tenant_id, name, body.job_id, key_id=caller.key_id
    )
    return answer(made, status=201)


def _latest(services: Services, tenant_id: str, reference: str) -> PromotionView:
    return services.resources.promotions.latest(tenant_id, _name_of(services, tenant_id, reference))


def _name_of(services: Services, tenant_id: str, reference: str) -> str:
    """The model name that an id or name refers to. A name without a model is kept: its models may be deleted, but their results stay."""
    try:
        return services.resources.models.get(tenant_id, reference).name
    except NightpressError as error:
        if error.code is not ErrorCode.NOT_FOUND:
            raise
        return reference
