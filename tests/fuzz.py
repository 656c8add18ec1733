"""`python -m tests.fuzz`: random hostile input for every file reader and every route.

The seed is printed first; FUZZ_SEED repeats a run. A reader may raise a NightpressError that blames the input, but must not crash, and
takes less than a second for each input. A route never answers 5xx, and leaves nothing in the state `uploading` for ever. A short run is
part of the tests: tests/security/test_fuzz.py.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import count, takewhile
from pathlib import Path

from tests.face import Face
from tests.fuzz_readers import READERS, Readers
from tests.fuzz_routes import Routes
from tests.models import bert_tiny_dir


def rounds_for(seconds: float) -> Iterator[int]:
    """Count until the time is over."""
    until = time.monotonic() + seconds
    return takewhile(lambda _: time.monotonic() < until, count())


def fuzz_readers(folder: Path, model: Path, rounds: Iterable[int], seed: int) -> Counter[str]:
    """Call every reader once a round. Raises AssertionError, with the seed that repeats it, if a reader fails."""
    readers = Readers(folder, model)
    tried: Counter[str] = Counter()
    for at in rounds:
        for name in READERS:
            dice = random.Random(f"{seed}/{name}/{at}")
            try:
                readers.attempt(name, dice)
            except BaseException as error:
                raise AssertionError(f"{name}, seed {seed}, input {at}: {error!r}") from error
            tried[name] += 1
    return tried


def fuzz_routes(face: Face, model: Path, rounds: Iterable[int], seed: int) -> Counter[int]:
    """Call a random route of a running API each round. Raises AssertionError with the request that failed."""
    dice = random.Random(seed)
    statuses: Counter[int] = Counter()
    with closing(Routes(face, model)) as routes:
        for _ in rounds:
            statuses[routes.attempt(dice)] += 1
        routes.check_rows()
    return statuses


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--seed", type=int, default=int(os.environ.get("FUZZ_SEED") or random.randrange(2**31)))
    wanted = options.parse_args()
    say = partial(print, flush=True)
    say(f"FUZZ_SEED={wanted.seed}")
    with tempfile.TemporaryDirectory(prefix="nightpress-fuzz-") as place:
        folder = Path(place)
        model = bert_tiny_dir(folder / "models")
        tried = fuzz_readers(folder / "readers", model, rounds_for(wanted.minutes * 30), wanted.seed)
        say(f"readers: {sum(tried.values())} inputs refused or read: {dict(tried)}")
        face = Face(folder / "api", webhook_networks=["127.0.0.0/8"])
        try:
            face.start()
            statuses = fuzz_routes(face, model, rounds_for(wanted.minutes * 30), wanted.seed)
        finally:
            face.close()
        say(f"routes: {sum(statuses.values())} requests: {dict(sorted(statuses.items()))}")


if __name__ == "__main__":
    sys.exit(main())
