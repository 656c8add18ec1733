"""Five hundred readers follow the events of twenty jobs through one API process: its memory, and events that are lost or repeated.

    python -m bench.event_streams [--clients 500]

The database is PostgreSQL, and the API runs in its own process. A third of the clients disconnect once and reconnect with Last-Event-ID.
"""

import asyncio
import random
import sys
import threading
import time

import httpx
import psutil

from bench.record import Figure, finish, make_parser
from bench.stack import is_healthy, postgres_and_valkey
from nightpress.core.service.access.keys import create_key
from nightpress.core.service.jobs.records import Claimed
from tests.jobs import offer, succeeded
from tests.servers import free_port
from tests.service import Service, eventually

JOBS, EVENTS = 20, 60


async def follow(client: httpx.AsyncClient, job_id: str, cut_at: int | None) -> list[int]:
    """The numbers of the events that one reader received, in order. `cut_at`: disconnect once after this number of events."""
    seen: list[int] = []
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(seen[-1])} if seen else {})
        async with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
            if response.status_code == 204:
                return seen
            response.raise_for_status()
            kind = ""
            async for line in response.aiter_lines():
                if line.startswith("event:"):
                    kind = line.removeprefix("event:").strip()
                if line.startswith("id:"):
                    seen.append(int(line.removeprefix("id:")))
                if not line and kind == "succeeded":
                    return seen
                if cut_at is not None and len(seen) >= cut_at and not line:
                    cut_at = None
                    break  # the connection is closed with the block


def work(service: Service, claimed: list[Claimed]) -> None:
    """Write the events that workers would write, then finish the jobs."""
    time.sleep(2)
    for step in range(EVENTS):
        for job in claimed:
            service.store.attempts.record_event(job.lease, "checkpoint", {"step": step})
    for job in claimed:
        service.store.attempts.finish(job.lease, succeeded(job.lease))


async def everybody(url: str, key: str, jobs: list[str], clients: int) -> list[list[int]]:
    dice = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=120, trust_env=False) as client:
        cuts = [dice.randint(2, EVENTS) if n % 3 == 0 else None for n in range(clients)]
        return await asyncio.gather(*(follow(client, jobs[n % len(jobs)], cut) for n, cut in enumerate(cuts)))


def measure(clients: int) -> list[Figure]:
    with postgres_and_valkey() as (folder, url, broker_url):
        port = free_port()
        service = Service(folder, url, broker_url=broker_url, api_port=port)
        try:
            jobs = [service.submit() for _ in range(JOBS)]
            claimed = [job for _ in jobs if (job := service.store.claims.claim(offer(), ttl_s=3600.0)) is not None]
            key = create_key(service.engine, tenant_id="default", name="bench", scopes=["jobs:read"])[1]
            more = {"NIGHTPRESS_API_CONNECTIONS_PER_ADDRESS": str(2 * clients)}  # all readers are on this machine
            process = psutil.Process(service.start("-m", "nightpress.api", **more).pid)
            base = f"http://127.0.0.1:{port}"
            eventually(lambda: is_healthy(base), within=60)
            idle, peak, over = process.memory_info().rss, [0], threading.Event()

            def weigh() -> None:
                while not over.wait(0.2):
                    peak[0] = max(peak[0], process.memory_info().rss)

            threads = [threading.Thread(target=weigh), threading.Thread(target=work, args=(service, claimed))]
            for thread in threads:
                thread.start()
            began = time.monotonic()
            seen = asyncio.run(everybody(base, key, jobs, clients))
            seconds = time.monotonic() - began
            over.set()
            for thread in threads:
                thread.join()
            whole = list(range(1, EVENTS + 4))  # queued, started, …, succeeded
            return [
                Figure("streams/clients", clients, "clients"),
                Figure("streams/events", len(whole), "events each"),
                Figure("streams/wrong", sum(events != whole for events in seen), "with a gap or a double", bar="<= 0"),
                Figure("memory/idle", round(idle / 1e6, 1), "MB"),
                Figure("memory/peak", round(peak[0] / 1e6, 1), "MB"),
                Figure("streams/seconds", round(seconds, 1), "s"),
            ]
        finally:
            service.close()


def main() -> int:
    parser = make_parser("event_streams", __doc__)
    parser.add_argument("--clients", type=int, default=500)
    options = parser.parse_args()
    return finish("event_streams", measure(options.clients), parser, options)


if __name__ == "__main__":
    sys.exit(main())
