"""Completes an embedder's files so that every server that reads a folder of sentence-transformers finds what it needs.

sentence-transformers 6 writes one key for the pooling and no longest text. text-embeddings-inference reads a key for each mode, and the longest
text, and refuses a folder without them. sentence-transformers ignores the older keys beside the new one.
"""

import json
from pathlib import Path
from typing import Any

from nightpress.core.compress.model.checkpoint import write_json
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.pooling import MODULES_FILE, POOLING_FLAGS, module_folders

_TRANSFORMER_FILE = "sentence_bert_config.json"


def complete_layout(folder: Path, header: ModelHeader) -> None:
    """Add the older keys to the pooling module's config and to `sentence_bert_config.json`, where these files lack them."""
    if header.task != "embedding" or not (folder / MODULES_FILE).is_file():
        return
    for name in module_folders(lambda path: (folder / path).read_bytes() if (folder / path).is_file() else None):
        file = folder / name / "config.json"
        config = json.loads(file.read_bytes()) if file.is_file() else {}
        if "pooling_mode" in config:
            modes = set(header.pooling.split("+"))
            _add(file, config, {key: mode in modes for key, mode in POOLING_FLAGS.items()})
    file, longest = folder / _TRANSFORMER_FILE, _longest_text(folder, header)
    if file.is_file() and longest is not None:
        _add(file, json.loads(file.read_bytes()), {"max_seq_length": longest})


def _longest_text(folder: Path, header: ModelHeader) -> int | None:
    """The most tokens of a text: the tokenizer's, or the model's positions if these are fewer. None: neither is known."""
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_bytes()).get("model_max_length") if file.is_file() else None
    known = [length for length in (said, header.positions) if isinstance(length, int) and 0 < length < 10**9]
    return min(known, default=None)


def _add(file: Path, config: dict[str, Any], keys: dict[str, Any]) -> None:
    missing = {key: value for key, value in keys.items() if key not in config}
    if missing:
        write_json(file, config | missing)
