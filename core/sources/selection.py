"""Selects the files of a source that belong to the model. Nothing else is fetched."""

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.filenames import INDEX_FILE, WEIGHTS_FILE
from nightpress.core.recipes.jsonfile import malformed
from nightpress.core.recipes.other_kinds import is_adapter
from nightpress.core.recipes.selection import select_adapter, select_files
from nightpress.core.sources.source import Listing, RemoteFile, Source, read_steadily

_MAX_SMALL = 16 * 1024**2


def choose_model_files(source: Source, listing: Listing) -> tuple[tuple[RemoteFile, ...], tuple[str, ...]]:
    """The files of the model, or of the adapter, among those of a listing, and the names of what is left out.

    Raises NightpressError: unsupported_format if there are no safetensors, malformed_model if the index names files that do not exist.
    """
    listed = {file.path: file for file in listing.files}

    def read(path: str) -> bytes:
        file = listed[path]
        if file.size > _MAX_SMALL:
            raise malformed(path, f"it has {file.size} bytes; at most {_MAX_SMALL} are read")
        return b"".join(read_steadily(source, file, stop=lambda: False))

    chosen = select_adapter(listed) if is_adapter(listed) else select_files(listed, read)
    if not any(path.endswith(".safetensors") for path in chosen.files):
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            "The source has no safetensors weights.",
            hint=f"Put {WEIGHTS_FILE} there, or its shards with {INDEX_FILE}.",
        )
    files = set(chosen.files)
    return tuple(file for file in listing.files if file.path in files), chosen.left_out
