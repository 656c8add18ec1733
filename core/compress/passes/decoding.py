"""What the passes about decoding share: running texts to decode after, and the settings that decoders read."""

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.rows import read_rows
from nightpress.core.compress.data.tokenized import open_tokenizer, text_windows
from nightpress.core.compress.model.checkpoint import write_json

_SETTINGS_FILE = "generation_config.json"


def prompts(source: Path, data: str, context: PassContext, *, count: int, length: int) -> Tensor:
    """Token ids of running text [count, length] on the context's device. data: a data set by its name in the recipe."""
    rows = read_rows(data, context.data_files.get(data), purpose="calibration")
    windows = text_windows(rows, open_tokenizer(source), samples=count, length=length, ref=data)
    return torch.from_numpy(windows.ids).to(context.device)


def change_settings(folder: Path, settings: Mapping[str, Any], *, without: Set[str] = frozenset()) -> None:
    """Add settings to a folder's generation_config.json, and remove those named in `without`."""
    file = folder / _SETTINGS_FILE
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    kept = {name: value for name, value in config.items() if name not in without}
    write_json(file, {**kept, **settings})
