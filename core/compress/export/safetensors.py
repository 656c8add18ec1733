"""A float model as a folder of safetensors, as transformers and most others read it."""

import json
import shutil
from pathlib import Path

from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.model.companions import copy_folder

#: The script that loads the saved folder in a fresh process; see runners/.
CONSUMER = Path(__file__).parents[1] / "runners" / "transformers_runner.py"
_OWN_CODE = Path(__file__).parents[1] / "model" / "generation_cache.py"


def save(model_dir: Path, out_dir: Path) -> None:
    """Copy the finished model folder to `out_dir`.

    If the settings ask for a cache that transformers does not have, the code of this cache is added.
    """
    copy_folder(model_dir, out_dir)
    settings = out_dir / "generation_config.json"
    if settings.is_file() and "mode" in (json.loads(settings.read_bytes()).get("cache_config") or {}):
        code = out_dir / "custom_generate" / "generate.py"  # where transformers looks for it
        with disk_errors():
            code.parent.mkdir()
            shutil.copyfile(_OWN_CODE, code)
