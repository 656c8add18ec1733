"""Reads and writes the file in which a source's outputs are kept for later jobs. The worker moves it; see core/handoff/source_outputs.py."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from nightpress.core.compress.export.consumer import Observed
from nightpress.core.compress.export.task import Task, add_arrays
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.handoff.source_outputs import MAX_BYTES

_ABOUT = "about"  #: the array that holds, as JSON, everything but the outputs


def read(path: Path, task: Task) -> Observed | None:
    """The kept outputs of the source, without timings. None if they are not those of this task's examples, or can't be read.

    The worker's digest already tells apart what differs in recipe, model, data and versions. This check also covers the examples' tokens.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            kept = {key: archive[key] for key in archive.files}
        about = json.loads(kept.pop(_ABOUT).tobytes())
        if about.pop("examples") != _digest(task):
            return None
        return Observed(outputs=kept, timings=(), writings=(), outputs_file=path, **about)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        return None


def write(path: Path, observed: Observed, task: Task) -> None:
    """Keep the outputs. The file appears whole, or not at all; there is none if it would have more than `MAX_BYTES`."""
    if sum(array.nbytes for array in observed.outputs.values()) > MAX_BYTES:
        return
    about = {
        "examples": _digest(task),
        "peak_memory": observed.peak_memory,
        "peak_gpu": observed.peak_gpu,
        "versions": observed.versions,
        "snippet": observed.snippet,
        "seconds": observed.seconds,
        "loaded_as": dict(observed.loaded_as),
    }
    unfinished = path.with_suffix(".partial.npz")
    with disk_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {**observed.outputs, _ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8)}
        np.savez(unfinished, **arrays)  # type: ignore[arg-type]  # numpy's stub reads ** as its keyword
        unfinished.replace(path)


def _digest(task: Task) -> str:
    """A SHA-256 of the examples as a runner gets them, and of what it keeps of each."""
    told = {"task": task.name, "pooling": task.pooling, "classes": task.classes, "sets": task.request()["sets"]}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    add_arrays(digest, {name: array for name, array in task.arrays().items() if name != "timing.ids"})
    return digest.hexdigest()
