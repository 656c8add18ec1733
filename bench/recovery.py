"""How long a job is nobody's when its worker is killed: from kill -9 to running again elsewhere, beside the lease.

python -m bench.recovery [--ttl 10] [--rounds 5] [--json]
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nightpress import migrations
from tests.servers import Postgres, Valkey
from tests.service import Service, eventually


def measure(ttl_s: float, rounds: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder,
        Postgres(Path(folder) / "postgres") as postgres,
        Valkey(Path(folder) / "valkey") as broker,
    ):
        url = postgres.create_database()
        migrations.upgrade(url)
        service = Service(Path(folder), url, broker_url=broker.url, lease_ttl_s=ttl_s, tick_s=2.0, retry_backoff_s=1.0)
        try:
            service.start_control()
            workers = {}
            for _ in range(2):
                known = {one.id for one in service.store.roster.workers()}
                process = service.start_worker("endless")
                (new,) = {one.id for one in service.store.roster.workers()} - known
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
                known = {one.id for one in service.store.roster.workers()}
                process = service.start_worker("endless")
                (new,) = {one.id for one in service.store.roster.workers()} - known
                workers[new] = process
        finally:
            service.close()
    return {
        "lease_ttl_s": ttl_s,
        "seconds": [round(one, 2) for one in seconds],
        "worst": round(max(seconds), 2),
        "bar": ttl_s + 5,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.add_argument("--ttl", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.ttl, options.rounds)
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
