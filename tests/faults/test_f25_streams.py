"""F25: the API is killed and restarted while clients read event streams: each client sees every event once."""

import asyncio
import threading
import time

import httpx

from nightpress.core.service.access.keys import create_key
from nightpress.core.service.jobs.records import Claimed
from tests.jobs import offer, succeeded
from tests.servers import free_port
from tests.service import Service, eventually

READERS, EVENTS = 20, 30


async def follow(client: httpx.AsyncClient, job_id: str) -> list[int]:
    """The ids of the events that a reader got. When its stream breaks, it reconnects with Last-Event-ID."""
    seen: list[int] = []
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(seen[-1])} if seen else {})
        try:
            async with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
                if response.status_code == 204:
                    return seen
                async for line in response.aiter_lines():
                    if line.startswith("id:"):
                        seen.append(int(line.removeprefix("id:")))  # noqa: PERF401 - keep the ids that came before the stream broke
        except httpx.TransportError:
            await asyncio.sleep(0.1)


def test_f25_an_api_that_is_killed_costs_its_readers_no_event(service: Service) -> None:
    port = free_port()
    key = create_key(service.engine, tenant_id="default", name="t", scopes=["jobs:read"])[1]
    job_id = service.submit()
    claimed = service.store.claims.claim(offer(), ttl_s=600)
    assert claimed is not None
    api = service.start("-m", "nightpress.api", NIGHTPRESS_API_PORT=str(port))
    base = f"http://127.0.0.1:{port}"
    eventually(lambda: _answers(base), within=60)

    def work(claimed: Claimed) -> None:
        for step in range(EVENTS):
            service.store.attempts.record_event(claimed.lease, "checkpoint", {"step": step})
            time.sleep(0.05)
            if step == EVENTS // 2:
                api.kill()
                api.wait()
                service.start("-m", "nightpress.api", NIGHTPRESS_API_PORT=str(port))
        service.store.attempts.finish(claimed.lease, succeeded(claimed.lease))

    async def everybody() -> list[list[int]]:
        headers = {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=base, headers=headers, limits=limits, timeout=30, trust_env=False
        ) as client:
            return await asyncio.wait_for(asyncio.gather(*(follow(client, job_id) for _ in range(READERS))), 60)

    worker = threading.Thread(target=work, args=(claimed,))
    worker.start()
    seen = asyncio.run(everybody())
    worker.join()
    whole = [event.seq for event in service.events(job_id)]
    assert len(whole) == EVENTS + 3
    assert all(item == whole for item in seen)


def _answers(base: str) -> bool:
    try:
        return httpx.get(f"{base}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
