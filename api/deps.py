"""The dependencies of routes: the services of this process, and the caller."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

from fastapi import Depends, Query, Request

from nightpress.api import browser
from nightpress.api.admission import Admission
from nightpress.api.metrics import ApiMetrics
from nightpress.api.ratelimit import RateLimiter, too_many
from nightpress.api.readiness import DatabaseProbe
from nightpress.api.tail import Tail
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.keys import Principal
from nightpress.core.service.compose import Resources

if TYPE_CHECKING:
    from nightpress.core.service.jobs.ring import Ringer

TENANT_HEADER = "x-nightpress-tenant"  #: in which of their tenants a person with a token acts
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Services:
    """Everything that a route may call, made once per process."""

    resources: Resources
    threads: ThreadPoolExecutor  #: for calls that wait for SQL; as many threads as SQL connections
    uploads: ThreadPoolExecutor  #: for uploads through the API, which take long for a slow client
    admission: Admission  #: limits the use of `uploads`
    transfers: ThreadPoolExecutor  #: for other calls that move many bytes
    parsing: ThreadPoolExecutor  #: one thread for texts that take long to parse, so that nobody else waits for a thread or for Python
    probes: ThreadPoolExecutor  #: for /readyz, so that a service that hangs blocks nothing else
    database_probe: DatabaseProbe
    limiter: RateLimiter
    ringer: "Ringer"
    tail: Tail
    metrics: ApiMetrics

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that waits for SQL in a thread, off the event loop."""
        context = copy_context()  # so that log lines from the thread name the request
        return await asyncio.get_running_loop().run_in_executor(
            self.threads, partial(context.run, function, *args, **kwargs)
        )

    async def parse(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that computes in a thread, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.parsing, partial(function, *args, **kwargs))

    async def transfer(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that moves many bytes in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.transfers, partial(function, *args, **kwargs))

    async def upload(self, caller: Principal, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that waits for the caller's bytes in a thread. Raises NightpressError(rate_limited) if no place becomes free."""
        async with self.admission.of(caller):
            return await asyncio.get_running_loop().run_in_executor(self.uploads, partial(function, *args, **kwargs))


#: For the OpenAPI document. `authenticated` reads the header itself: FastAPI's security dependency takes as long as a request's SQL.
API_KEY_SCHEME = {
    "ApiKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, `np_…`. `nightpress up` writes one to its data folder; `python -m nightpress.core.service.access create-key` makes more. Where `GET /auth/provider` names a provider, one of its ID tokens or JWT access tokens is taken, too.",
    }
}


async def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


async def authenticated(request: Request) -> Principal:
    """A dependency: the caller whose key, token or session the request has. What was checked in the last seconds needs no SQL.

    Raises NightpressError(unauthenticated) for a missing or wrong key, and NightpressError(rate_limited).
    """
    return await _caller_of(request, "bearer")


async def _caller_of(request: Request, *schemes: str) -> Principal:
    scheme, _, plain = request.headers.get("authorization", "").partition(" ")
    services: Services = request.app.state.services
    if scheme.lower() == "basic" in schemes:
        scheme, plain = "bearer", _password_of(plain)
    if scheme.lower() == "bearer" and plain:
        caller = await _bearer(services, request, plain.strip())
    elif (cookie := browser.session_of(request, services.resources)) is not None:
        caller = await browser.signed_in(services.resources.sessions, services.call, request, cookie)
    else:
        raise NightpressError(
            ErrorCode.UNAUTHENTICATED,
            "The request carries no API key.",
            hint="Send `Authorization: Bearer np_…`. `nightpress up` writes a key to its data folder.",
        )
    state = request.scope.setdefault("state", {})
    if "caller" not in state:  # count a request once, although several dependencies ask for its caller
        state["caller"] = caller
        await _count(services, caller, state)
    return caller


async def _bearer(services: Services, request: Request, plain: str) -> Principal:
    """The caller of a key, or of a token of the provider that people sign in with."""
    resources = services.resources
    if resources.sign_in is not None and "." in plain:  # no key has a dot, and every signed token has two
        tenant_id = request.headers.get(TENANT_HEADER)
        caller = resources.sign_in.cached(plain, tenant_id)
        if caller is None:
            caller = await services.transfer(resources.sign_in.authenticate, plain, tenant_id)
        return caller
    caller = resources.keys.cached(plain)
    if caller is None:
        caller = await services.call(resources.keys.authenticate, plain)
    return caller


async def _count(services: Services, caller: Principal, state: dict[str, Any]) -> None:
    """Count a request against the rate limit of its key. Raises NightpressError(rate_limited)."""
    quotas = services.resources.quotas.cached(caller.tenant_id)
    if quotas is None:
        quotas = await services.call(services.resources.quotas.of, caller.tenant_id)
    if quotas.rate_limit_per_minute:
        taken = await services.limiter.take(caller.family, quotas.rate_limit_per_minute)
        state["headers"] = taken.headers
        if not taken.allowed:
            raise too_many(quotas.rate_limit_per_minute)


def _password_of(encoded: str) -> str:
    """The password of HTTP's basic authentication. Empty if it is malformed."""
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def needs(scope: str, *, schemes: tuple[str, ...] = ("bearer",)) -> Callable[[Request], Awaitable[Principal]]:
    """Make a dependency that returns the caller. It raises NightpressError(forbidden) if the key lacks `scope`.

    schemes: how the key may be sent. With "basic" it may be the password, for programs that know only that, such as feed readers.
    """

    async def allowed(request: Request) -> Principal:
        caller = await _caller_of(request, *schemes)
        if scope not in caller.scopes and not caller.is_admin:
            raise NightpressError(
                ErrorCode.FORBIDDEN,
                f"This needs a key with the scope {scope}.",
                hint=f"The key has: {', '.join(sorted(caller.scopes)) or 'none'}.",
            )
        return caller

    return allowed


ServicesDep = Annotated[Services, Depends(services)]
JobsReader = Annotated[Principal, Depends(needs("jobs:read"))]
JobsWriter = Annotated[Principal, Depends(needs("jobs:write"))]
ModelsReader = Annotated[Principal, Depends(needs("models:read"))]
FeedReader = Annotated[Principal, Depends(needs("models:read", schemes=("bearer", "basic")))]
ModelsWriter = Annotated[Principal, Depends(needs("models:write"))]
DeliveriesReader = Annotated[Principal, Depends(needs("deliveries:read"))]
DeliveriesWriter = Annotated[Principal, Depends(needs("deliveries:write"))]
KeysReader = Annotated[Principal, Depends(needs("keys:read"))]
KeysWriter = Annotated[Principal, Depends(needs("keys:write"))]
Admin = Annotated[Principal, Depends(needs("admin"))]
WebhooksReader = Annotated[Principal, Depends(needs("webhooks:read"))]
WebhooksWriter = Annotated[Principal, Depends(needs("webhooks:write"))]
WorkersReader = Annotated[Principal, Depends(needs("workers:read"))]

Cursor = Annotated[str | None, Query(max_length=512, description="`next_cursor` of the previous page.")]
Limit = Annotated[int, Query(ge=1, le=200)]
