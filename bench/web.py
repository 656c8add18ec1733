"""The web page in headless Chromium: milliseconds from the start of loading to a list of jobs that can be clicked, with many jobs.

    python -m bench.web [--jobs 10000] [--rounds 9]

Each round has its own browser context, so that nothing is cached. The database is SQLite; it and one API process run on this machine.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from bench.record import Figure, finish, make_parser
from tests.browser import chromium
from tests.face import Face
from tests.jobs import add_model, submit


def main() -> int:
    parser = make_parser("web", __doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
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
    figures = [
        Figure("first click/median", round(statistics.median(rounds)), "ms"),
        Figure("first click/slowest", round(max(rounds)), "ms", bar="< 1000"),
    ]
    return finish("web", figures, parser, options)


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
