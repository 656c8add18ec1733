"""A tiny valid model that tests of hostile files corrupt, and the error by which it is refused then."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model

CONFIG: dict[str, Any] = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 4}


def write_safetensors(root: Path, header: object, *, data: int, length: int | None = None) -> None:
    """Write model.safetensors: a header, then `data` zero bytes as a sparse hole. `length`: the header's length to claim, if wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with (root / "model.safetensors").open("wb") as target:
        target.write(struct.pack("<Q", len(raw) if length is None else length) + raw)
        target.truncate(8 + len(raw) + data)


def refused(root: Path, *codes: ErrorCode) -> NightpressError:
    with pytest.raises(NightpressError) as error:
        inspect_model(FolderFiles(root))
    assert error.value.code in codes, error.value
    assert error.value.kind.status == 422
    assert error.value.hint
    return error.value
