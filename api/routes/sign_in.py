"""Signing in and out of the page by OpenID Connect, and the sessions of a tenant."""

import logging
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from nightpress.api import browser
from nightpress.api.deps import Cursor, KeysReader, KeysWriter, Limit, ServicesDep
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.oidc.sessions import SIGN_IN_S
from nightpress.core.wire.access import ProviderView, SessionView, TenantId
from nightpress.core.wire.base import Page

router = APIRouter(tags=["access"])
_NO_STORE = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}

log = logging.getLogger(__name__)


@router.get(
    "/auth/provider",
    response_model=ProviderView,
    summary="Say which OpenID Connect provider people sign in with; needs no key",
)
async def sign_in_provider(services: ServicesDep) -> Response:
    sign_in = services.resources.sign_in
    return answer(ProviderView() if sign_in is None else sign_in.about())


@router.get("/auth/sign-in", include_in_schema=False)
async def begin(
    services: ServicesDep,
    place: Annotated[str, Query(max_length=1000)] = "#/jobs",
    tenant: Annotated[TenantId | None, Query()] = None,
) -> Response:
    """Lead the browser to the provider."""
    sign_in, settings = services.resources.sign_in, services.resources.settings
    if sign_in is None:
        raise NightpressError(
            ErrorCode.NOT_FOUND, "Nobody signs in by OIDC here.", hint="Use an API key, or set NIGHTPRESS_OIDC_ISSUER."
        )
    try:
        begun = await services.transfer(sign_in.begin, place, tenant)
    except NightpressError as error:
        return _back(error)
    response = RedirectResponse(begun.url, 303, _NO_STORE)
    browser.keep_sign_in(response, settings, begun.cookie, SIGN_IN_S)
    return response


@router.get("/auth/callback", include_in_schema=False)
async def finish(request: Request, services: ServicesDep) -> Response:
    """Where the provider leads the browser back to."""
    sign_in, settings = services.resources.sign_in, services.resources.settings
    if sign_in is None:
        return RedirectResponse("/", 303, _NO_STORE)
    parts = {name: value for name, value in request.query_params.items() if len(value) <= 4096}
    pending, session = (
        browser.read(request, settings, browser.SIGN_IN),
        browser.read(request, settings, browser.SESSION),
    )
    try:
        finished = await services.transfer(sign_in.finish, parts, pending, session=session)
    except NightpressError as error:
        response = _back(error)
        browser.clear(response, settings, browser.SIGN_IN)
        return response
    response = RedirectResponse(f"/{finished.place}", 303, _NO_STORE)
    browser.keep(response, settings, finished.cookie)
    return response


@router.post("/auth/sign-out", include_in_schema=False)
async def sign_out(request: Request, services: ServicesDep) -> Response:
    """End the session of this browser. The person stays signed in at the provider."""
    settings = services.resources.settings
    response = Response(status_code=204, headers=_NO_STORE)
    cookie = browser.session_of(request, services.resources)
    if cookie is not None:
        browser.check_own_page(request, cookie)
        await services.call(services.resources.sessions.end, cookie)
        browser.clear(response, settings, browser.SESSION, browser.CSRF)
    return response


@router.get("/v1/sessions", response_model=Page[SessionView], summary="List the sessions of people who have signed in")
async def list_sessions(
    caller: KeysReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    items, following = await services.call(
        services.resources.sessions.page, caller.tenant_id, cursor=cursor, limit=limit
    )
    return answer(Page[SessionView](items=items, next_cursor=following))


@router.delete(
    "/v1/sessions/{session_id}",
    status_code=204,
    response_class=Response,
    summary="End a session",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def end_session(session_id: str, caller: KeysWriter, services: ServicesDep) -> Response:
    await services.call(services.resources.sessions.revoke, caller.tenant_id, session_id)
    return Response(status_code=204)


def _back(error: NightpressError) -> RedirectResponse:
    """Lead the browser back to the page, which tells the reason by the error's code: no text of the provider is shown."""
    log.warning("a sign-in failed: %s: %s", error.code.value, error.message)
    return RedirectResponse(f"/#sign-in={error.code.value}", 303, _NO_STORE)
