"""The HTTP API: `create_app` joins the routes, the services and the error handling."""

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from sqlalchemy import Engine
from starlette.routing import Route

from nightpress.api import once, pages, problems
from nightpress.api.admission import UPLOADS, Admission
from nightpress.api.deps import API_KEY_SCHEME, Services
from nightpress.api.metrics import ApiMetrics
from nightpress.api.middleware import RequestMiddleware
from nightpress.api.problems import documented
from nightpress.api.ratelimit import RateLimiter
from nightpress.api.readiness import DatabaseProbe
from nightpress.api.routes import (
    admin,
    costs,
    credentials,
    datasets,
    deliveries,
    destinations,
    health,
    history,
    jobs,
    keys,
    me,
    models,
    promotions,
    queues,
    recipes,
    results,
    schedules,
    sign_in,
    signing,
    studies,
    webhooks,
    workers,
)
from nightpress.api.tail import Tail
from nightpress.core.database import make_engine
from nightpress.core.errors import ErrorCode
from nightpress.core.service.compose import Resources
from nightpress.core.service.jobs.positions import Position, read_positions
from nightpress.core.service.studies.store import read_positions as study_positions
from nightpress.core.settings import Settings
from nightpress.core.wire.base import Problem

_ROUTES = (
    jobs,
    history,
    results,
    signing,
    schedules,
    studies,
    models,
    promotions,
    datasets,
    deliveries,
    destinations,
    credentials,
    recipes,
    workers,
    queues,
    webhooks,
    keys,
    sign_in,
    me,
    costs,
    admin,
    health,
)
_SQL_CONNECTIONS = 8
_TRANSFERS = 16
_DESCRIPTION = """
Nightpress compresses Transformer models overnight and proves what it did.

Add a model (`/v1/models`), choose a recipe (`/v1/recipes`), submit a job (`/v1/jobs`), follow it (`…/events`), fetch its artifacts (`…/artifacts`)
and read the comparison (`…/report`). A study (`/v1/studies`) tries many recipes and finds the best that keeps your gates. Every error is a problem document (RFC 9457) with a `code` from a closed set.
"""


def create_app(settings: Settings) -> FastAPI:
    """The application of this process. Its services are opened here and closed with its lifespan."""
    services = open_services(settings)
    app = FastAPI(
        title="Nightpress",
        version=version("nightpress"),
        description=_DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=partial(_lifespan, services),
        docs_url=None,  # api/pages serves its own page, which loads nothing from other sites
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,  # names the methods of generated clients
    )
    app.state.services = services
    routers = [*(module.router for module in _ROUTES), pages.router]
    problems.install(app, [route for router in routers for route in router.routes if isinstance(route, Route)])
    app.add_middleware(RequestMiddleware, max_body_bytes=settings.max_body_bytes, metrics=services.metrics)
    for router in routers:
        app.include_router(router)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return app


def open_services(settings: Settings) -> Services:
    """Make the services on database, storage and broker. None of these is contacted yet: /readyz reports whether they answer."""
    # Celery, which the ring imports, would take a fifth of the time to import this module.
    from nightpress.core.service.jobs.ring import Ringer

    engine = make_engine(settings.sql_url, pool_size=_SQL_CONNECTIONS)
    resources = Resources(settings, engine)
    resources.open()
    threads = ThreadPoolExecutor(_SQL_CONNECTIONS, thread_name_prefix="sql")
    return Services(
        resources=resources,
        threads=threads,
        uploads=ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload"),
        admission=Admission(),
        transfers=ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="transfer"),
        parsing=ThreadPoolExecutor(1, thread_name_prefix="parse"),
        probes=ThreadPoolExecutor(3, thread_name_prefix="probe"),
        database_probe=DatabaseProbe(settings.sql_url),
        limiter=RateLimiter(settings.celery_url),
        ringer=Ringer(settings),
        tail=Tail(partial(_positions, engine), threads),
        metrics=ApiMetrics(),
    )


def _positions(engine: Engine, ids: Sequence[str]) -> dict[str, Position]:
    """The positions of jobs and studies."""
    of_studies = [name for name in ids if name.startswith("std_")]
    of_jobs = [name for name in ids if not name.startswith("std_")]
    found = read_positions(engine, of_jobs) if of_jobs else {}
    return found | (study_positions(engine, of_studies) if of_studies else {})


@asynccontextmanager
async def _lifespan(services: Services, _app: FastAPI) -> AsyncIterator[None]:
    yield
    services.tail.close()
    await services.limiter.close()
    services.ringer.close()
    for pool in (services.threads, services.uploads, services.transfers, services.parsing, services.probes):
        pool.shutdown(wait=False, cancel_futures=True)
    services.resources.close()
    services.database_probe.close()


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with our schema of errors instead of the framework's."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            license_info=app.license_info,
            routes=app.routes,
        )
        schemas = document["components"]["schemas"]
        schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        document["components"]["securitySchemes"] = API_KEY_SCHEME
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if method == "post":
                    operation.setdefault("parameters", []).append(once.PARAMETER)
                if path.startswith("/v1/"):
                    operation["security"] = [{"ApiKey": []}]
                _complete_responses(operation)
        app.openapi_schema = document
    return app.openapi_schema


def _complete_responses(operation: dict[str, Any]) -> None:
    """Add the errors that every route may return."""
    answers = operation["responses"]
    codes = [ErrorCode.DATABASE_UNAVAILABLE, ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN]
    everywhere = documented(*(codes if operation.get("security") else []))
    if "application/json" in answers.get("422", {}).get("content", {}):
        everywhere |= documented(ErrorCode.INVALID_REQUEST)
        del answers["422"]
    for status, entry in everywhere.items():
        answers.setdefault(str(status), entry)
