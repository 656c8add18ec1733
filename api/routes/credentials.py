"""Credentials of destinations: a tenant stores, replaces and deletes them. No answer shows a secret."""

from typing import Annotated

from fastapi import APIRouter, Body
from starlette.responses import Response

from nightpress.api.deps import Cursor, DeliveriesReader, DeliveriesWriter, Limit, ServicesDep
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.versions import IfMatch, answer_version, version_of
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.base import Page
from nightpress.core.wire.deliveries import CredentialCreate, CredentialRotate, CredentialView

router = APIRouter(prefix="/v1/credentials", tags=["deliveries"], route_class=OnceRoute)

_EXAMPLES = {
    "the Hub": {
        "summary": "A token of the Hugging Face Hub",
        "value": {"prefix": "hf://acme", "secrets": {"token": "hf_example"}},
    },
    "a bucket": {
        "summary": "A key of a bucket",
        "value": {
            "prefix": "s3://models/released",
            "secrets": {"access_key_id": "example", "secret_access_key": "example"},
        },
    },
    "a registry": {
        "summary": "A user of an OCI registry",
        "value": {
            "prefix": "oci://registry.example.com/acme",
            "secrets": {"username": "robot", "password": "example"},
        },
    },
}


@router.post(
    "",
    status_code=201,
    response_model=CredentialView,
    summary="Store credentials for the destinations below a prefix",
    responses=documented(ErrorCode.INVALID_REQUEST, ErrorCode.CONFLICT, ErrorCode.QUOTA_EXCEEDED),
)
async def create_credential(
    caller: DeliveriesWriter, services: ServicesDep, body: Annotated[CredentialCreate, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    made = await services.call(services.resources.credentials.create, caller.tenant_id, body, key_id=caller.key_id)
    return answer_version(made, status=201)


@router.get("", response_model=Page[CredentialView], summary="List credentials, without their secrets, newest first")
async def list_credentials(
    caller: DeliveriesReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    items, following = await services.call(
        services.resources.credentials.page, caller.tenant_id, cursor=cursor, limit=limit
    )
    return answer(Page[CredentialView](items=items, next_cursor=following))


@router.get(
    "/{credential_id}",
    response_model=CredentialView,
    summary="Get credentials, without their secrets",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def get_credential(credential_id: str, caller: DeliveriesReader, services: ServicesDep) -> Response:
    return answer_version(await services.call(services.resources.credentials.get, caller.tenant_id, credential_id))


@router.post(
    "/{credential_id}/rotate",
    response_model=CredentialView,
    summary="Replace the secrets; the next attempt of each delivery uses them",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.INVALID_REQUEST),
)
async def rotate_credential(
    credential_id: str, caller: DeliveriesWriter, services: ServicesDep, body: CredentialRotate
) -> Response:
    rotate = services.resources.credentials.rotate
    return answer_version(await services.call(rotate, caller.tenant_id, credential_id, body.secrets))


@router.delete(
    "/{credential_id}",
    status_code=204,
    response_class=Response,
    summary="Delete credentials; deliveries that need them fail",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.PRECONDITION_FAILED),
)
async def delete_credential(
    credential_id: str, caller: DeliveriesWriter, services: ServicesDep, if_match: IfMatch = None
) -> Response:
    await services.call(
        services.resources.credentials.delete, caller.tenant_id, credential_id, version=version_of(if_match)
    )
    return Response(status_code=204)
