"""The web page in headless Chromium: milliseconds from the first byte asked for to a list of jobs that can be clicked, with many jobs there.

    python -m bench.web [--jobs 10000] [--rounds 7] [--json]

Each round is a browser context of its own, so nothing is cached. SQLite, one API process, both on this machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from tests.browser import chromium
from tests.face import Face
from tests.jobs import add_model, submit


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.web", description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        face = Face(Path(folder))
        add_model(face.engine)
        for number in range(options.jobs):
            submit(face.store, name=f"job {number}", max_queued=options.jobs + 1)
        face.start()
        try:
            rounds = measure(face, options.rounds)
        finally:
            face.close()
    figures = {
        "jobs": options.jobs,
        "interactive_ms": round(statistics.median(rounds), 1),
        "slowest_ms": round(max(rounds), 1),
        "bar_ms": 1000,
    }
    if options.json:
        print(json.dumps(figures))
    else:
        print(
            f"{options.jobs} jobs: a list to click after {figures['interactive_ms']} ms (median of {options.rounds}, slowest {figures['slowest_ms']} ms; bar 1000 ms)"
        )
    return 0 if figures["interactive_ms"] < figures["bar_ms"] else 1


def measure(face: Face, rounds: int) -> list[float]:
    taken = []
    with chromium() as browser:
        for _ in range(rounds):
            with browser.open("about:blank") as seen:
                seen.page.goto(f"{face.url}/#key={face.key}", wait_until="commit")
                seen.page.wait_for_selector("tbody tr:nth-child(50)")
                taken.append(float(seen.page.evaluate("performance.now()")))
    return taken


if __name__ == "__main__":
    sys.exit(main())
