"""F10: eight claimers in four processes race for six hundred jobs, and each job is claimed once."""

import json
import subprocess
import sys
from collections import Counter

from nightpress.core.service.jobs.store import JobStore
from tests.jobs import submit
from tests.service import ROOT

_CLAIMER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from nightpress.core.database import make_engine
from nightpress.core.errors import NightpressError
from nightpress.core.service.jobs.store import JobStore
from tests.jobs import offer
store = JobStore(make_engine(sys.argv[1]))

def work(name):
    found = []
    while True:
        try:
            claimed = store.claims.claim(offer(name), ttl_s=600)
        except NightpressError:
            continue  # SQLite lets one write at a time, and says so
        if claimed is None:
            return found
        found.append(claimed.job.id)

with ThreadPoolExecutor(2) as pool:
    print(json.dumps(list(pool.map(work, (sys.argv[2] + "a", sys.argv[2] + "b")))))
"""


def test_f10_no_job_is_claimed_twice(store: JobStore, sql_url: str):
    jobs = {submit(store) for _ in range(600)}
    processes = [
        subprocess.Popen([sys.executable, "-c", _CLAIMER, sql_url, f"w{n}"], cwd=ROOT, stdout=subprocess.PIPE)
        for n in range(4)
    ]
    claimed: list[str] = []
    workers = 0
    for process in processes:
        answer, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        for share in json.loads(answer):
            claimed += share
            workers += bool(share)
    assert Counter(claimed) == Counter(jobs)
    assert workers > 1, "they did race"
    assert all(
        len([event for event in store.reader.events(job_id) if event.kind == "started"]) == 1
        for job_id in list(jobs)[:20]
    )
