"""Copies a model's folder, with or without its weights."""

import json
import os
import shutil
from pathlib import Path

from nightpress.core.compress.model.checkpoint import INDEX_FILE, disk_errors, write_json

_FAMILY = "speeds"  #: folder of the slower models of a family, inside the folder of the fastest


def family_member(folder: Path, speed: float) -> Path:
    """Return the folder of the model of this speed, which a pass wrote inside the folder of the fastest model."""
    return folder / _FAMILY / f"{speed:g}x"


def copy_companions(source: Path, target: Path) -> None:
    """Copy all files of a model except its weights and their index: config, tokenizer, module descriptions. Makes the folder."""
    with disk_errors():
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.rglob("*")):
            if path.relative_to(source).parts[0] == _FAMILY:
                continue
            if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX_FILE:
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def forget_quantization(folder: Path) -> None:
    """Take out what other libraries say of codes: after decoding, the weights are floats."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    config.pop("quantization_config", None)
    write_json(path, config)
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        (folder / name).unlink(missing_ok=True)


def copy_folder(model_dir: Path, out_dir: Path) -> None:
    """Copy a folder to `out_dir`. Files become hard links if the file system supports them, so that no data is copied."""
    with disk_errors():
        shutil.copytree(model_dir, out_dir, copy_function=link_or_copy)


def link_or_copy(source: str, target: str) -> None:
    """Make a hard link if the file system supports it, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
