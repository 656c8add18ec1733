"""Shared by the tests of pages: a browser, and a real API with a model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, chromium
from tests.face import Face


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    face = Face(
        tmp_path_factory.mktemp("face"),
        webhook_networks=["127.0.0.0/8"],
        source_prefixes=["s3://released"],
        destinations=["hf://acme"],
    )
    face.start()
    yield face
    face.close()


@pytest.fixture(scope="module")
def model_id(face: Face, bert_tiny: Path) -> str:
    with face.client() as client:
        return client.models.upload(bert_tiny).id
