"""The outputs of a job's source for the examples of its recipe: measured by one job, and used by later jobs of the same tenant.

The worker puts the file of an earlier job at `KEPT_FILE`. Without one, the child measures the source and writes `FRESH_FILE`, and the worker
stores it. Both lie below work/. The file is only read by the child: its format is known to `core.compress.stages.kept_source` alone.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from nightpress.core.processor import cpu_features
from nightpress.core.recipes.models import Quality, Recipe

KEPT_FILE = "kept-source.npz"
FRESH_FILE = "fresh-source.npz"
#: A larger file is not kept. Whole distributions over the vocabulary take at most 32 MiB for each evaluation.
MAX_BYTES = 512 * 1024**2

_FORM = 1  #: of the file and of what a runner computes; raised when either changes
#: The libraries that compute a source's outputs, or make its examples.
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "accelerate", "numpy")


def processor_class() -> str:
    """Return what decides the rounding of this machine's arithmetic: the architecture and the instruction sets that libraries may use."""
    return " ".join([platform.machine(), *cpu_features()])


def source_digest(
    recipe: Recipe, *, tenant_id: str, model_digest: str, data: Mapping[str, str], device: str, engine: str
) -> str:
    """Return a SHA-256 of everything that determines the source's outputs. Passes, exports, gates and timings don't.

    data: the recipe's name of a data set → its digest; the digests decide, not the names. device: the name of the GPU on which the source is
    measured, or `processor_class()`. The number type follows from device and model.
    """
    evaluations = [
        {**entry.model_dump(mode="json"), "data": data.get(entry.data, entry.data)}
        for entry in recipe.evaluate
        if isinstance(entry, Quality)
    ]
    body = {
        "form": _FORM,
        "tenant": tenant_id,
        "model": model_digest,
        "evaluations": evaluations,
        "seed": recipe.seed,
        "screen": recipe.screen,
        "device": device,
        "engine": engine,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES},
    }
    if recipe.searches:
        body["searches"] = True  # with outputs for the half of the data that chooses
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
