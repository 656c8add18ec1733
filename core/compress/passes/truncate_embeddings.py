"""Say in a model's folder that users get the first numbers of its vectors."""

import json
import time
from pathlib import Path

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.model.checkpoint import write_json
from nightpress.core.compress.model.companions import copy_folder
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.passes import TruncateEmbeddings
from nightpress.core.recipes.passes.embedders import embedding_width
from nightpress.core.recipes.pooling import MODULES_FILE
from nightpress.core.recipes.sentence import CONFIG_FILE

_PREFIX = "sentence_transformers.models"
_POOLING = "1_Pooling"


@folder_pass(TruncateEmbeddings)
def truncate_embeddings(source: Path, target: Path, options: TruncateEmbeddings, context: PassContext) -> PassRecord:
    """Copy the model with `truncate_dim` in its settings. A folder without modules gets them: else the settings are not read."""
    start = time.monotonic()
    copy_folder(source, target)
    file, header = target / CONFIG_FILE, context.header
    settings = json.loads(file.read_bytes()) if file.is_file() else {"prompts": {}, "similarity_fn_name": "cosine"}
    write_json(file, settings | {"truncate_dim": options.dimensions})
    if not (target / MODULES_FILE).is_file():
        kinds = {"": "Transformer", _POOLING: "Pooling"}
        write_json(
            target / MODULES_FILE,
            [
                {"idx": at, "name": str(at), "path": path, "type": f"{_PREFIX}.{kind}"}
                for at, (path, kind) in enumerate(kinds.items())
            ],
        )
        modes = header.pooling.split("+")
        wide = (embedding_width(header) or 0) // len(modes)
        pooling = target / _POOLING / "config.json"
        if not pooling.is_file():
            pooling.parent.mkdir(exist_ok=True)
            write_json(
                pooling, {"word_embedding_dimension": wide, "pooling_mode": modes if len(modes) > 1 else modes[0]}
            )
    seconds = time.monotonic() - start
    return PassRecord(
        index=context.index, name=options.name, seconds=seconds, summary={"dimensions": options.dimensions}
    )
