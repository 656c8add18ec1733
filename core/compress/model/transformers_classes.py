"""Writes the table of transformers' classes that plans are made with: `python -m nightpress.core.compress.model.transformers_classes`.

A service has no transformers, and must know what a class answers. The table holds transformers' own mappings from a model's type to its
classes. A test compares it with the installed version.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nightpress.core.recipes.classes import MAPPINGS, TABLE

_SOUND = ("input_values", "input_features", "audio")


def table() -> dict[str, Any]:
    """Return the version of transformers, mapping → model type → class, and two more tables.

    `TAKEN_APART` is model type → patterns of names in files. `READS` is model type → `images`, `sound` or `other`, for the classes of
    `MODEL` that no other mapping has and that do not read text.
    """
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
    told = {name for mapping in MAPPINGS if mapping != "MODEL" for name in found[mapping].values()}
    reads = {kind: _reads(kind, name) for kind, name in found["MODEL"].items() if name not in told}
    found["READS"] = {kind: what for kind, what in reads.items() if what != "text"}
    return found


def _reads(model_type: str, class_name: str) -> str:
    """Return what a class reads, from the source of its module: importing all modules would take a minute."""
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    module = model_type_to_module_name(model_type)
    file = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
    if not file.is_file():  # a type that another type's classes load
        return "text"
    bodies = list(_bodies(file.read_text(), class_name))
    named = next(
        (found[1] for body in bodies if (found := re.search(r'^    main_input_name = "(\w+)"', body, re.M))), ""
    )
    heads = (re.search(r"^    def forward\(.*?\)(?: -> .*?)?:$", body, re.M | re.S) for body in bodies)
    head = next((found[0].strip() for found in heads if found), None)
    if head is None:
        return "text"
    arguments = ast.parse(f"{head} pass").body[0].args  # type: ignore[attr-defined]  # it is a function
    names = [argument.arg for argument in arguments.args[1:]]
    needed = names[: len(names) - len(arguments.defaults)]
    main = named or (names[0] if names else "input_ids")
    if main.startswith(_SOUND):
        return "sound"
    if main == "pixel_values" and "input_ids" not in names and set(needed) <= {main}:
        return "images"
    return "text" if main == "input_ids" else "other"


def _bodies(source: str, class_name: str) -> Iterator[str]:
    """Yield the source of a class, then of the first base of each that is in the same module."""
    while (
        found := re.search(rf"^class {class_name}\((\w+)[^)]*\):\n(.*?)(?=^\S|\Z)", source, re.M | re.S)
    ) is not None:
        yield found[2]
        class_name = found[1]


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
