"""Which files of a local model folder are sent, and whether they are a model. Only headers and small files are read for that."""

from dataclasses import dataclass
from pathlib import Path

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.adapters import ADAPTER_DIR, adapter_files
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, check_adapter, inspect_adapter, inspect_model
from nightpress.core.recipes.models import plain_name
from nightpress.core.recipes.other_kinds import is_adapter


@dataclass(frozen=True)
class SentFolder:
    """A checked folder: `files` to send, by their name at the server, and the names that are `left_out`."""

    name: str
    files: dict[str, Path]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class ModelFolder(SentFolder):
    """A checked folder of a model."""

    header: ModelHeader


def read_sent_folder(folder: Path, name: str | None = None) -> SentFolder:
    """Choose the files of a model, or of an adapter, whose base the server has. Raises NightpressError as `read_model_folder`."""
    if not is_adapter_folder(folder):
        return read_model_folder(folder, name)
    files = FolderFiles(folder)
    chosen = files.selection()
    inspect_adapter(files)
    return SentFolder(
        name or plain_name(files.root.name), {path: files.path(path) for path in chosen.files}, chosen.left_out
    )


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder is an adapter of peft without the weights of its base."""
    return folder.is_dir() and is_adapter(FolderFiles(folder).listing())


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
