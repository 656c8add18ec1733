"""What routes are given: the services of this process, and who is calling."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

from fastapi import Depends, Query, Request

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

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Services:
    """Everything a route may call, made once a process."""

    resources: Resources
    threads: ThreadPoolExecutor  #: for calls that wait for SQL; as many as there are SQL connections
    uploads: ThreadPoolExecutor  #: for uploads through the API, which last as long as their client takes
    admission: Admission  #: to these threads
    transfers: ThreadPoolExecutor  #: for what else moves many bytes
    probes: ThreadPoolExecutor  #: for /readyz, so that a part that hangs holds up nothing else
    database_probe: DatabaseProbe
    limiter: RateLimiter
    ringer: "Ringer"
    tail: Tail
    metrics: ApiMetrics

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something that waits for SQL off the event loop: one hop to a thread a request, not one a dependency."""
        context = copy_context()  # what is logged there names the request too
        return await asyncio.get_running_loop().run_in_executor(
            self.threads, partial(context.run, function, *args, **kwargs)
        )

    async def transfer(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for what moves many bytes."""
        return await asyncio.get_running_loop().run_in_executor(self.transfers, partial(function, *args, **kwargs))

    async def upload(self, caller: Principal, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for what waits for the caller's bytes."""
        async with self.admission.of(caller):
            return await asyncio.get_running_loop().run_in_executor(self.uploads, partial(function, *args, **kwargs))


#: Stands in the OpenAPI document. Keys are read by hand below: a dependency of a dependency costs each request as much as its SQL.
API_KEY_SCHEME = {
    "ApiKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, `np_…`. `nightpress up` writes one to its data folder; `python -m nightpress.core.service.access create-key` makes more.",
    }
}


async def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


async def authenticated(request: Request) -> Principal:
    """A dependency: whose key the request carries. A key seen in the last seconds costs no SQL."""
    scheme, _, plain = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not plain:
        raise NightpressError(
            ErrorCode.UNAUTHENTICATED,
            "The request carries no API key.",
            hint="Send `Authorization: Bearer np_…`. `nightpress up` writes a key to its data folder.",
        )
    services: Services = request.app.state.services
    caller = services.resources.keys.cached(plain.strip())
    if caller is None:
        caller = await services.call(services.resources.keys.authenticate, plain.strip())
    state = request.scope.setdefault("state", {})
    if "caller" not in state:  # counted once a request, however many ask who is calling
        state["caller"] = caller
        await _count(services, caller, state)
    return caller


async def _count(services: Services, caller: Principal, state: dict[str, Any]) -> None:
    """Take one from the key's share of requests. Raises NightpressError(rate_limited)."""
    quotas = services.resources.quotas.cached(caller.tenant_id)
    if quotas is None:
        quotas = await services.call(services.resources.quotas.of, caller.tenant_id)
    if quotas.rate_limit_per_minute:
        taken = await services.limiter.take(caller.family, quotas.rate_limit_per_minute)
        state["headers"] = taken.headers
        if not taken.allowed:
            raise too_many(quotas.rate_limit_per_minute)


def needs(scope: str) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency: the caller, whose key must allow `scope`."""

    async def allowed(request: Request) -> Principal:
        caller = await authenticated(request)
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
ModelsWriter = Annotated[Principal, Depends(needs("models:write"))]
KeysReader = Annotated[Principal, Depends(needs("keys:read"))]
KeysWriter = Annotated[Principal, Depends(needs("keys:write"))]
Admin = Annotated[Principal, Depends(needs("admin"))]
WebhooksReader = Annotated[Principal, Depends(needs("webhooks:read"))]
WebhooksWriter = Annotated[Principal, Depends(needs("webhooks:write"))]
WorkersReader = Annotated[Principal, Depends(needs("workers:read"))]

Cursor = Annotated[str | None, Query(max_length=512, description="`next_cursor` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=200)]
