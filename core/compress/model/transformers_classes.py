"""Writes the table of transformers' classes that plans are made with: `python -m nightpress.core.compress.model.transformers_classes`.

A service has no transformers, and must know what a class answers. The table holds transformers' own mappings from a model's type to its
classes. A test compares it with the installed version.
"""

import json
from collections.abc import Mapping
from typing import Any

from nightpress.core.recipes.classes import MAPPINGS, TABLE


def table() -> dict[str, Any]:
    """Return the version of transformers, and mapping → model type → class."""
    import transformers
    from transformers.models.auto import modeling_auto

    found: dict[str, Any] = {"transformers": transformers.__version__}
    for mapping in MAPPINGS:
        named: Mapping[str, Any] = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES")
        found[mapping] = {kind: names if isinstance(names, str) else names[0] for kind, names in sorted(named.items())}
    return found


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
