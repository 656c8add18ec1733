"""Liveness, readiness and metrics, for load balancers, people and Prometheus. No answer names a tenant."""

import asyncio
import logging
from collections.abc import Callable
from importlib.metadata import version

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from nightpress.api.broker import ping_broker
from nightpress.api.deps import Services, ServicesDep, needs
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.wire.system import ReadyView

log = logging.getLogger(__name__)
router = APIRouter(tags=["health"])

_PATIENCE_S = 3.0
_METRICS_READER = needs("metrics:read")


@router.get("/healthz", summary="Whether the process answers", response_model=dict[str, str])
async def healthz() -> Response:
    return JSONResponse({"status": "ok"})


@router.get(
    "/readyz",
    response_model=ReadyView,
    summary="Whether database, broker and storage answer",
    description="`degraded`: jobs are accepted, but they wait, because the broker or the storage is away. 503: the database is away, or can't be written; `checks` says which.",
    responses={503: {"model": ReadyView}},
)
async def readyz(services: ServicesDep) -> Response:
    database, broker, storage = await asyncio.gather(
        _check(services, services.database_probe.ask),
        _check(services, lambda: ping_broker(services.resources.settings.celery_url)),
        _check(services, services.resources.objects.check),
    )
    checks = {"database": database, "broker": broker, "storage": storage}
    status = "unavailable" if database != "ok" else "ok" if set(checks.values()) == {"ok"} else "degraded"
    return answer(
        ReadyView(status=status, checks=checks, version=version("nightpress")),
        status=503 if status == "unavailable" else 200,
        headers={"Retry-After": "5"} if status == "unavailable" else None,
    )


@router.get(
    "/metrics",
    response_class=Response,
    summary="Figures for Prometheus",
    description="Open, unless the operator asks for a key with the scope `metrics:read` (NIGHTPRESS_METRICS_ACCESS).",
    responses={
        200: {"content": {"text/plain": {}}},
        **documented(ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN, ErrorCode.DATABASE_UNAVAILABLE),
    },
)
async def metrics(request: Request, services: ServicesDep) -> Response:
    if services.resources.settings.metrics_access == "key":
        await _METRICS_READER(request)
    figures = await services.call(
        services.metrics.queue,
        lambda: (
            services.resources.store.reader.statistics(),
            services.resources.store.roster.workers(),
            services.resources.store.roster.fleet(),
            services.resources.costs.spent_by_all() if services.resources.costs.prices else None,
        ),
    )
    return Response(services.metrics.render(*figures), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _check(services: Services, ask: Callable[[], object]) -> str:
    """Run a check. Returns `ok` or a few words. Callers need no key, so the exact reason goes only to the log."""
    try:
        await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(services.probes, ask), _PATIENCE_S)
    except TimeoutError:
        return "does not answer in time"
    except NightpressError as error:
        log.warning("not ready: %s", error)
        return str(error.details.get("said", "does not answer"))
    except OSError as error:
        log.warning("not ready: %s", error)
        return "does not answer"
    return "ok"
