"""Which files of a local model folder are sent, and whether they are a model. Only headers and small files are read for that."""

import re
from dataclasses import dataclass
from pathlib import Path

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.adapters import ADAPTER_DIR, adapter_files
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, check_adapter, inspect_model


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder: `files` to send, by their name at the server, and the names that are `left_out`."""

    name: str
    files: dict[str, Path]
    left_out: tuple[str, ...]
    header: ModelHeader


def read_model_folder(folder: Path, name: str | None = None) -> ModelFolder:
    """Choose a model's files in a folder as it lies, and check them as the server will. Links are followed as on the server.

    Raises NightpressError with the server's own codes: unsupported_format, malformed_model, unsupported_architecture, path_not_allowed.
    """
    if not folder.is_dir():
        raise NightpressError(
            ErrorCode.NOT_FOUND,
            f"{folder} is not a folder.",
            hint="Name the folder that holds config.json and model.safetensors.",
        )
    files = FolderFiles(folder)
    chosen = files.selection()
    return ModelFolder(
        name=name or plain_name(files.root.name),
        files={path: files.path(path) for path in chosen.files},
        left_out=chosen.left_out,
        header=inspect_model(files),
    )


def read_adapter_folder(folder: Path, base: ModelFolder, name: str | None = None) -> ModelFolder:
    """Choose an adapter's files, and check that it fits its base. The result has the base's files, and the adapter's below `adapter/`.

    Raises NightpressError: unsupported_format for what is no adapter of peft in safetensors, or can't be merged exactly; malformed_model if
    it does not fit the base.
    """
    files = FolderFiles(folder)
    chosen = adapter_files(files.listing())
    check_adapter(files, base.header)
    return ModelFolder(
        name=name or plain_name(files.root.name),
        files=base.files | {f"{ADAPTER_DIR}/{path}": files.path(path) for path in chosen},
        left_out=base.left_out,
        header=base.header,
    )


def plain_name(text: str) -> str:
    """A valid name from any text: lower case, with dashes in place of other characters."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return name[:64] or "model"
