"""Shared by the security tests: a model to corrupt, and webhooks with a receiver."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.receiver import Receiver
from tests.tiny_model import CONFIG, write_safetensors
from tests.webhooks import World


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny valid model, which the tests corrupt."""
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(root, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, data=8)
    inspect_model(FolderFiles(root))
    return root


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str) -> Iterator[World]:
    world = World(tmp_path, sqlite_url)
    yield world
    world.courier.close()
    world.engine.dispose()
