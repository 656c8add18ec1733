"""Names of a model's files: which a model may have, and the errors about shards that are missing."""

from collections.abc import Collection, Iterable, Set
from pathlib import PurePosixPath

from nightpress.core.errors import ErrorCode, NightpressError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".spm", ".codes", ".jinja", ".md"})
_NAMES = frozenset({"LICENSE", "LICENCE", "NOTICE", "README"})

_SHOWN = 20  #: number of problems that an error names
_HINTS = 4  #: number of hints that an error contains


def is_model_file(path: str) -> bool:
    """Return whether a file of this name may be part of a model."""
    pure = PurePosixPath(path)
    return pure.suffix in _SUFFIXES or pure.name in _NAMES


def missing_shards(named: Set[str], present: Collection[str]) -> Iterable[NightpressError]:
    """Yield an error for each shard that the index names and that is not present."""
    missing = sorted(named - set(present))
    if missing and WEIGHTS_FILE in present:
        shown = ", ".join(path[:100] for path in missing[:_SHOWN])
        hint = (
            f"If {WEIGHTS_FILE} is the whole model, delete {INDEX_FILE}; else bring the shards, and not {WEIGHTS_FILE}."
        )
        what = f"{INDEX_FILE} is stale: it names {shown}, which is not there, and {WEIGHTS_FILE} lies beside it."
        yield NightpressError(ErrorCode.MALFORMED_MODEL, what, hint=hint, file=INDEX_FILE)
        return
    for path in missing:
        yield NightpressError(
            ErrorCode.MALFORMED_MODEL,
            f"{INDEX_FILE}: it names {path[:200]}, which is not there.",
            hint="Fetch the missing shards, or save the model again into an empty folder: an index and its shards belong together.",
            file=INDEX_FILE,
            shard=path[:200],
        )


def raise_all(errors: Iterable[NightpressError]) -> None:
    """Raise the errors, if there are any: a single error as it is, several as one error that names all of them."""
    found = list(errors)
    if len(found) == 1:
        raise found[0]
    if not found:
        return
    shown = found[:_SHOWN]
    files = [str(error.details.get("shard") or error.details.get("file", ""))[:100] for error in shown]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise NightpressError(
        found[0].code,
        f"{found[0].message} In all, {len(found)} things are wrong with the model's files: see {', '.join(dict.fromkeys(files))}{more}.",
        hint=" ".join(list(dict.fromkeys(error.hint for error in found))[:_HINTS]),
        file=files[0],
        faults=[{"at": file, "problem": error.message[:300]} for file, error in zip(files, shown, strict=True)],
    )
