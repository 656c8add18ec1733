"""Writes the table of transformers' classes that plans are made with: `python -m nightpress.core.compress.model.transformers_classes`.

A service has no transformers, and must know what a class answers. The table holds transformers' own mappings from a model's type to its
classes. A test compares it with the installed version.
"""

import json
from collections.abc import Mapping
from typing import Any

from nightpress.core.recipes.classes import MAPPINGS, TABLE


def table() -> dict[str, Any]:
    """Return the version of transformers, mapping → model type → class, and `TAKEN_APART` → model type → patterns of names in files."""
    import transformers
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.models.auto import modeling_auto

    found: dict[str, Any] = {"transformers": transformers.__version__}
    for mapping in MAPPINGS:
        named: Mapping[str, Any] = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES")
        found[mapping] = {kind: names if isinstance(names, str) else names[0] for kind, names in sorted(named.items())}
    kinds = {kind for mapping in MAPPINGS for kind in found[mapping]}
    converters = {
        kind: [pattern for entry in entries if isinstance(entry, WeightConverter) for pattern in entry.source_patterns]
        for kind, entries in sorted(_build_checkpoint_conversion_mapping().items())
        if kind in kinds
    }
    # Experts have rules of their own: see readable.py.
    apart = {kind: [name for name in patterns if "expert" not in name] for kind, patterns in converters.items()}
    found["TAKEN_APART"] = {kind: patterns for kind, patterns in apart.items() if patterns}
    return found


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
