"""Which of a source's files are the model's. The others, a trainer's pickles and other frameworks' weights, are never fetched."""

import json
from collections.abc import Sequence

from core.errors import ErrorCode, NightpressError
from core.recipes.inspect import INDEX_FILE, WEIGHTS_FILE, check_names, is_model_file
from core.sources.source import Listing, RemoteFile, Source, read_steadily

_MAX_INDEX = 16 * 1024**2


def choose_model_files(source: Source, listing: Listing) -> tuple[RemoteFile, ...]:
    """Raises NightpressError: unsupported_format where there are no safetensors, malformed_model for names that no file has."""
    taken = [one for one in listing.files if is_model_file(one.path) and not _is_hidden(one.path)]
    weights = _weights(source, taken)
    chosen = tuple(
        one for one in taken if one.path in weights or not one.path.endswith(".safetensors")
    )  # a repository may hold the same weights twice, e.g. sharded and whole
    if not weights:
        others = {one.path: one.size for one in listing.files if not _is_hidden(one.path)}
        check_names(others)  # says of the first file that is no model's what it is, and how to convert it
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            "The source has no safetensors weights.",
            hint=f"Put {WEIGHTS_FILE} there, or its shards with {INDEX_FILE}.",
        )
    check_names({one.path: one.size for one in chosen})
    return chosen


def _weights(source: Source, files: Sequence[RemoteFile]) -> set[str]:
    """The shards that an index names, else the one whole file, else whatever lies at the top: the inspection says what is wrong with it."""
    by_name = {one.path: one for one in files}
    index = by_name.get(INDEX_FILE)
    if index is not None and index.size <= _MAX_INDEX:
        named = _named_in(b"".join(read_steadily(source, index, stop=lambda: False)))
        if named is not None:
            return named & by_name.keys()
    if WEIGHTS_FILE in by_name:
        return {WEIGHTS_FILE}
    return {path for path in by_name if path.endswith(".safetensors") and "/" not in path}


def _named_in(index: bytes) -> set[str] | None:
    try:
        return {str(one) for one in json.loads(index)["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in {".", ".."} for part in path.split("/"))
