"""F29: the random faults of `make soak`, for a few seconds."""

from pathlib import Path

import pytest

from tests.soak import Soak


@pytest.mark.slow
def test_f29_a_few_seconds_of_chaos_violate_nothing(tmp_path: Path) -> None:
    Soak(tmp_path, "embedded", seed=29, say=print).run(6.0)
