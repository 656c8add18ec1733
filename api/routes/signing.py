"""The public keys that check the signatures of artifacts."""

from fastapi import APIRouter
from starlette.responses import Response

from nightpress.api.deps import JobsReader, ServicesDep
from nightpress.api.routes import answer
from nightpress.core.wire.base import Page
from nightpress.core.wire.results import SigningKeyView

router = APIRouter(prefix="/v1/signing-keys", tags=["results"])


@router.get("", response_model=Page[SigningKeyView], summary="List the keys that have signed artifacts here")
async def list_signing_keys(caller: JobsReader, services: ServicesDep) -> Response:
    del caller  # the keys are the installation's
    return answer(Page[SigningKeyView](items=await services.call(services.resources.signing.public_keys)))
