"""Checkpoints of passes: the names of their files below work/, and the digests by which jobs share them.

A pass calls `context.checkpoint(path, step)` for each complete file below work/. The supervisor copies the file to storage under a digest
of everything that determines its bytes. A later attempt, or another job with the same digest, gets the file at the same path below work/.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import Quality, Recipe
from nightpress.core.recipes.passes.catalog import providers_of


def pass_folder(index: int, name: str) -> str:
    """Return the folder below work/ to which a pass writes its model."""
    return f"passes/{index}-{name}"


def pass_record(index: int, name: str) -> str:
    """Return the path below work/ of the file that marks a pass as finished. This file is written last."""
    return f"{pass_folder(index, name)}.json"


class FinishedPass(BaseModel):
    """A finished pass: the files of its model, and the data from which the report and the next pass continue without running it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    made_of: str  #: digest of everything that determined the result, as far as the child knows it
    files: dict[str, int]  #: path below the pass's folder → size in bytes
    header: ModelHeader  #: of the pass's model; after a pass that must be last, of the model before it
    records: tuple[PassRecord, ...]  #: of this pass and of the passes before it

    @classmethod
    def load(cls, work: Path, index: int, name: str, *, made_of: str) -> "FinishedPass | None":
        """Return the record of an earlier attempt, if its digest is `made_of` and every file in it has the recorded size; else None."""
        try:
            found = cls.model_validate_json((work / pass_record(index, name)).read_bytes())
        except (OSError, ValueError):
            return None
        folder = work / pass_folder(index, name)
        whole = all(
            (folder / path).is_file() and (folder / path).stat().st_size == size for path, size in found.files.items()
        )
        return found if whole and found.made_of == made_of else None


def prefix_digests(
    recipe: Recipe, *, tenant_id: str, model_digest: str, data: Mapping[str, str], device: str, engine: str
) -> list[str]:
    """Return for each pass a digest of everything that determines its result: model, passes up to this one, their data, device and engine.

    A further digest at the end is for the graph that is traced from the last pass's model.

    data: the recipe's name of a data set → its digest. A data set that only the report's figures need is left out of the digests.
    """
    digests = []
    for count in (*range(1, len(recipe.passes) + 1), None):
        passes = [options.model_dump(mode="json") for options in recipe.passes[:count]]
        reads = any(options.wants != "nothing" for options in recipe.passes[:count])
        calibration = recipe.calibration.model_dump(mode="json") if reads else None
        # A search within a gate measures its candidates on the evaluation's data.
        searches = any(options.gate_within is not None for options in recipe.passes[:count])
        measured = [
            entry.model_dump(mode="json") for entry in recipe.evaluate if isinstance(entry, Quality) and searches
        ]
        said = set(_strings([passes, calibration, measured]))
        body: dict[str, Any] = {
            "tenant": tenant_id,
            "model": model_digest,
            "passes": passes,
            "calibration": calibration,
            "seed": recipe.seed,
            "data": {name: digest for name, digest in data.items() if name in said},
            "device": device,
            "engine": engine,
        }
        if packages := providers_of(options.name for options in recipe.passes[:count]):
            body["packages"] = sorted(str(package) for package in packages.values())
        if measured:
            body["measured"] = measured
        if count is None:
            body["makes"] = "graph"
        digests.append(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())
    return digests


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
