"""A float model as a folder of safetensors, as transformers and most others read it."""

import os
import shutil
from pathlib import Path
from typing import Any

from core.compress.checkpoint import disk_errors

#: The script that loads the saved folder in a fresh process; see runners/.
CONSUMER = Path(__file__).with_name("runners") / "transformers_runner.py"


def save(model_dir: Path, out_dir: Path, **_context: Any) -> None:
    """Put the finished model folder at `out_dir`. Files are linked where the file system can, so that no byte is written twice."""
    with disk_errors():
        shutil.copytree(model_dir, out_dir, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
