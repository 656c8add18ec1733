"""S17: hostile input for every file reader and every route, for a minute. `make fuzz` runs for any time."""

from pathlib import Path

import pytest

from tests.face import Face
from tests.fuzz import fuzz_readers, fuzz_routes
from tests.fuzz_readers import READERS

_SEED = 15
_SECONDS = 30


@pytest.mark.slow
def test_every_reader_refuses_or_reads_whatever_comes(tmp_path: Path, bert_tiny: Path):
    tried = fuzz_readers(tmp_path / "readers", bert_tiny, _SECONDS, _SEED)
    assert tried.keys() == READERS.keys()
    assert min(tried.values()) >= 10


@pytest.mark.slow
def test_no_request_gets_a_500_and_no_row_is_stuck(tmp_path: Path, bert_tiny: Path):
    face = Face(tmp_path, webhook_networks=["127.0.0.0/8"])
    try:
        face.start()
        statuses = fuzz_routes(face, bert_tiny, _SECONDS, _SEED)
    finally:
        face.close()
    assert {200, 404, 422} <= statuses.keys()
    assert statuses.total() > 100
