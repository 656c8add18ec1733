"""S17: hostile input for every file reader and every route, as often on every machine. `make fuzz` runs for any time."""

from pathlib import Path

import pytest

from tests.face import Face
from tests.fuzz import fuzz_readers, fuzz_routes
from tests.fuzz_readers import READERS

_SEED = 15
_INPUTS = 100  #: for each reader
_REQUESTS = 300


@pytest.mark.slow
def test_every_reader_refuses_or_reads_whatever_comes(tmp_path: Path, bert_tiny: Path):
    tried = fuzz_readers(tmp_path / "readers", bert_tiny, range(_INPUTS), _SEED)
    assert tried == dict.fromkeys(READERS, _INPUTS)


@pytest.mark.slow
def test_no_request_gets_a_500_and_no_row_is_stuck(tmp_path: Path, bert_tiny: Path):
    face = Face(tmp_path, webhook_networks=["127.0.0.0/8"])
    try:
        face.start()
        statuses = fuzz_routes(face, bert_tiny, range(_REQUESTS), _SEED)
    finally:
        face.close()
    assert {200, 404, 422} <= statuses.keys()
    assert statuses.total() == _REQUESTS
