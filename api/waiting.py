"""`Prefer: wait=N` (RFC 7240): the answer is sent when the job has ended, or after N seconds."""

import asyncio
import re
import time

from starlette.requests import Request

from nightpress.api.deps import Services
from nightpress.core.service.jobs.records import Job
from nightpress.core.service.jobs.states import is_terminal

LONGEST_S = 60
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?(?=$|[,;\s])", re.IGNORECASE)

PARAMETER = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": f"`wait=N`: answer when the job has ended, or after N seconds, {LONGEST_S} at most.",
    "schema": {"type": "string", "examples": ["wait=30"]},
}


def preferred_wait(request: Request) -> int:
    """Seconds that the caller prefers to wait; 0 without a preference. Other preferences are ignored."""
    found = _WAIT.search(request.headers.get("prefer", ""))
    return min(int(found[1]), LONGEST_S) if found else 0


async def until_ended(services: Services, job: Job, wait_s: int) -> Job:
    """Wait until the job has ended, at most `wait_s` seconds. Returns its last known row. No thread is blocked during the wait."""
    deadline = time.monotonic() + wait_s
    with services.tail.watch(job.id) as watch:
        while not is_terminal(job.state) and not services.tail.closed:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                await asyncio.wait_for(watch.changed.wait(), left)
            except TimeoutError:
                break
            watch.changed.clear()
            now = await services.call(services.resources.store.reader.get, job.tenant_id, job.id)
            job = now or job  # a job that was deleted meanwhile is returned as it was read last
    return job
