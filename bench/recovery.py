"""Time without a worker after a worker was killed: from kill -9 until the job runs on another worker, beside the duration of the lease.

    python -m bench.recovery [--ttl 10] [--rounds 5]

There are two workers, on PostgreSQL. The control process ticks every two seconds, which is the default.
"""

import random
import sys
import time

from bench.record import Figure, finish, make_parser
from bench.stack import postgres_and_valkey
from tests.service import Service, eventually


def measure(ttl_s: float, rounds: int) -> list[Figure]:
    with postgres_and_valkey() as (folder, url, broker_url):
        service = Service(folder, url, broker_url=broker_url, lease_ttl_s=ttl_s, tick_s=2.0, retry_backoff_s=1.0)
        try:
            service.start_control()
            workers = {}
            for _ in range(2):
                known = {worker.id for worker in service.store.roster.workers()}
                process = service.start_worker("endless")
                (new,) = {worker.id for worker in service.store.roster.workers()} - known
                workers[new] = process
            seconds = []
            for _ in range(rounds):
                job_id = service.submit(max_failures=5, run_limit_s=3600.0, stall_s=3600.0)
                first = service.await_state(job_id, "running", within=60)
                time.sleep(random.Random(len(seconds)).uniform(0.5, 3.0))
                workers.pop(str(first.worker_id)).kill()
                killed = time.monotonic()
                eventually(lambda job_id=job_id: service.job(job_id).attempt == 2, within=3 * ttl_s + 60)
                seconds.append(time.monotonic() - killed)
                service.store.requests.request_cancel("default", job_id)
                service.await_state(job_id, "cancelled", within=30)
                known = {worker.id for worker in service.store.roster.workers()}
                process = service.start_worker("endless")
                (new,) = {worker.id for worker in service.store.roster.workers()} - known
                workers[new] = process
        finally:
            service.close()
    return [
        Figure("leases", ttl_s, "s"),
        Figure("kill to running/fastest", round(min(seconds), 2), "s"),
        Figure("kill to running/slowest", round(max(seconds), 2), "s", bar=f"<= {ttl_s + 5:g}"),
    ]


def main() -> int:
    parser = make_parser("recovery", __doc__)
    parser.add_argument("--ttl", type=float, default=10.0, help="seconds of a lease; the bar is 5 seconds more")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    return finish("recovery", measure(options.ttl, options.rounds), parser, options)


if __name__ == "__main__":
    sys.exit(main())
