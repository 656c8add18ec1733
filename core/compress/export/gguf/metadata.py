"""What a GGUF file says about the model as a whole: name, size, licence, origin, and how its authors sample from it.

llama.cpp's converter reads the same from a folder, by the class `gguf.Metadata`. It also takes names from the folder's own name, which
here is that of a job's folder and says nothing.
"""

import math
from pathlib import Path
from typing import Any

import gguf

from nightpress.core.compress.lineage import read_lineage
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.jsonfile import parse_json

#: Key of generation_config.json → field of the metadata
_SAMPLING = {
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
    "temperature": "sampling_temp",
}


def add_metadata(writer: gguf.GGUFWriter, model_dir: Path, header: ModelHeader) -> None:
    """Write the keys `general.*`. The model card is untrusted: what can't be read of it is left out."""
    writer.add_type(gguf.GGUFType.MODEL)
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), read_lineage(model_dir), dict(header.config), None, header.parameters
    )
    found.size_label = found.size_label or gguf.size_label(header.parameters, header.parameters, 0, 0)
    found.name = found.name or f"{header.model_type.replace('_', ' ').title()} {found.size_label}"
    sampling = _read(model_dir / "generation_config.json")
    for key, field in _SAMPLING.items():
        value = sampling.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            setattr(found, field, int(value) if key == "top_k" else float(value))
    found.set_gguf_meta_model(writer)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.name, path.read_bytes())
    except (OSError, NightpressError):
        return {}
    return found if isinstance(found, dict) else {}
