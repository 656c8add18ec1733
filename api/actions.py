"""The audit log: every request that changed something is recorded before its answer is sent."""

import logging
from typing import Any

from starlette.types import Scope

from nightpress.api.deps import Services
from nightpress.core.errors import NightpressError
from nightpress.core.service.access.keys import Principal

#: Not recorded: a job's row names its key, and a part belongs to an upload whose announcement was recorded.
_NOT_NOTED = {("POST", "/v1/jobs"), ("PUT", "/parts/{number}"), ("POST", "/v1/recipes/validate")}

log = logging.getLogger(__name__)


async def note_action(scope: Scope, status: int) -> None:
    """Write the action of a request to the audit log. If the database does not answer, write it to the process's log instead."""
    state: dict[str, Any] = scope.get("state", {})
    caller: Principal | None = state.get("caller")
    method, route = scope["method"], getattr(scope.get("route"), "path", "")
    if caller is None or method in {"GET", "HEAD", "OPTIONS"} or not route or status >= 400:
        return
    if state.get("replayed"):  # the first request with this Idempotency-Key was recorded
        return
    if any(method == verb and route.endswith(end) for verb, end in _NOT_NOTED):
        return
    services: Services = scope["app"].state.services
    line = {
        "tenant_id": caller.tenant_id,
        "key_id": caller.key_id,
        "action": f"{method} {route}",
        "subject": scope["path"],
        "status": status,
        "request_id": state.get("request_id", ""),
    }
    try:
        await services.call(services.resources.audit.note, **line)
    except NightpressError:
        log.exception("The audit log could not be written: %s", line)
