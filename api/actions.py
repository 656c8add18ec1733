"""Every request that changed something goes into the audit log before its answer goes out."""

import logging
from typing import Any

from starlette.types import Scope

from nightpress.api.deps import Services
from nightpress.core.errors import NightpressError
from nightpress.core.service.access.keys import Principal

#: Jobs carry the key that asked for them, and parts are bytes of what was already announced.
_TOLD_ELSEWHERE = {("POST", "/v1/jobs"), ("PUT", "/parts/{number}"), ("POST", "/v1/recipes/validate")}

log = logging.getLogger(__name__)


async def note_action(scope: Scope, status: int) -> None:
    """Write the line. A database that has just gone away can't undo what was done: then the process's log has the line."""
    state: dict[str, Any] = scope.get("state", {})
    caller: Principal | None = state.get("caller")
    method, route = scope["method"], getattr(scope.get("route"), "path", "")
    if caller is None or method in {"GET", "HEAD", "OPTIONS"} or not route or status >= 400:
        return
    if state.get("replayed"):  # it was done, and noted, before
        return
    if any(method == verb and route.endswith(end) for verb, end in _TOLD_ELSEWHERE):
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
