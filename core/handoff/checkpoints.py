"""Where a job can go on: what lies below work/ under which name, and when what one job left is what another would make.

A pass calls `context.checkpoint(path, step)` for each file below work/ that is whole. The supervisor copies it to storage under the
digest of all that decided its bytes; whoever begins the same way finds it below work/ again, under the same path.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import Recipe
from nightpress.core.recipes.passes.catalog import providers_of


def pass_folder(index: int, name: str) -> str:
    """Where below work/ a pass puts the model it makes."""
    return f"passes/{index}-{name}"


def pass_record(index: int, name: str) -> str:
    """The file below work/ that says that a pass is done. It is written last."""
    return f"{pass_folder(index, name)}.json"


class FinishedPass(BaseModel):
    """A pass that is done: the files of its model, and what the report and the next pass need to know without doing it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    made_of: str  #: the digest of all that decided it, as far as the child knows
    files: dict[str, int]  #: sizes by path below the pass's folder
    header: ModelHeader  #: of the model, or, behind a last pass, of the one before
    records: tuple[PassRecord, ...]  #: of this pass and those before it

    @classmethod
    def load(cls, work: Path, index: int, name: str, *, made_of: str) -> "FinishedPass | None":
        """What an earlier attempt left, if it was made of the same and every file it names is there."""
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
    """For each pass a digest of all that decides what it makes: the model, the passes up to it, what they read, who computes.

    One more at the end is for the graph that is traced from what all passes made.

    data: digest of each data set by what the recipe calls it; one that only the evaluation reads decides nothing here.
    """
    digests = []
    for count in (*range(1, len(recipe.passes) + 1), None):
        passes = [options.model_dump(mode="json") for options in recipe.passes[:count]]
        reads = any(options.wants != "nothing" for options in recipe.passes[:count])
        calibration = recipe.calibration.model_dump(mode="json") if reads else None
        said = set(_strings([passes, calibration]))
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
