"""Selects the files of a source that belong to the model. A trainer's pickles and other frameworks' weights are never fetched."""

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.filenames import INDEX_FILE, WEIGHTS_FILE, check_names, choose_files
from nightpress.core.sources.source import Listing, RemoteFile, Source, read_steadily

_MAX_INDEX = 16 * 1024**2


def choose_model_files(source: Source, listing: Listing) -> tuple[RemoteFile, ...]:
    """The model's files among those of a listing.

    Raises NightpressError: unsupported_format if there are no safetensors, malformed_model if the index names files that do not exist.
    """
    listed = {file.path: file for file in listing.files if not _is_hidden(file.path)}

    def read(path: str) -> bytes:
        file = listed[path]
        return b"".join(read_steadily(source, file, stop=lambda: False)) if file.size <= _MAX_INDEX else b""

    chosen = choose_files(listed, read)
    check_names(chosen)
    if not any(path.endswith(".safetensors") for path in chosen):
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            "The source has no safetensors weights.",
            hint=f"Put {WEIGHTS_FILE} there, or its shards with {INDEX_FILE}.",
        )
    return tuple(listed[path] for path in chosen)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in {".", ".."} for part in path.split("/"))
