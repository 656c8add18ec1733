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
from contextlib import closing
from functools import partial
from pathlib import Path

from tests.face import Face
from tests.fuzz_readers import READERS, Readers
from tests.fuzz_routes import Routes
from tests.models import bert_tiny_dir


def fuzz_readers(folder: Path, model: Path, seconds: float, seed: int) -> Counter[str]:
    """Call every reader in turn until the time is over. Raises AssertionError, with the seed that repeats it, if a reader fails."""
    readers = Readers(folder, model)
    tried: Counter[str] = Counter()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for name in READERS:
            at = tried[name]
            dice = random.Random(f"{seed}/{name}/{at}")
            try:
                readers.attempt(name, dice)
            except BaseException as error:
                raise AssertionError(f"{name}, seed {seed}, input {at}: {error!r}") from error
            tried[name] += 1
    return tried


def fuzz_routes(face: Face, model: Path, seconds: float, seed: int) -> Counter[int]:
    """Call random routes of a running API until the time is over. Raises AssertionError with the request that failed."""
    dice = random.Random(seed)
    statuses: Counter[int] = Counter()
    until = time.monotonic() + seconds
    with closing(Routes(face, model)) as routes:
        while time.monotonic() < until:
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
        tried = fuzz_readers(folder / "readers", model, wanted.minutes * 30, wanted.seed)
        say(f"readers: {sum(tried.values())} inputs refused or read: {dict(tried)}")
        face = Face(folder / "api", webhook_networks=["127.0.0.0/8"])
        try:
            face.start()
            statuses = fuzz_routes(face, model, wanted.minutes * 30, wanted.seed)
        finally:
            face.close()
        say(f"routes: {sum(statuses.values())} requests: {dict(sorted(statuses.items()))}")


if __name__ == "__main__":
    sys.exit(main())
