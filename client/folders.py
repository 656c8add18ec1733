"""Which files of a local model folder are sent, and whether they are a model. Only headers and small files are read for that."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.filenames import check_names, choose_files
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.pooling import module_folders


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder: `files` to send, by their name at the server, and the names that are `left_out`."""

    name: str
    files: dict[str, Path]
    left_out: tuple[str, ...]
    header: ModelHeader


class _ChosenFiles:
    """Only the chosen files of a folder, in the form that core.recipes.inspect reads."""

    def __init__(self, folder: FolderFiles, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = names

    def names(self) -> Mapping[str, int]:
        return {name: self._folder.path(name).stat().st_size for name in self._names}

    def read(self, path: str, offset: int, size: int) -> bytes:
        return self._folder.read(path, offset, size)


def read_model_folder(folder: Path, name: str | None = None) -> ModelFolder:
    """Choose the files of a model as `save_pretrained` writes it, and check them as the server will.

    They lie at the top of the folder and in the folders that `modules.json` names. Links are followed as on the server.
    Raises NightpressError with the server's own codes: unsupported_format, malformed_model, unsupported_architecture, path_not_allowed.
    """
    if not folder.is_dir():
        raise NightpressError(
            ErrorCode.NOT_FOUND,
            f"{folder} is not a folder.",
            hint="Name the folder that holds config.json and model.safetensors.",
        )
    files = FolderFiles(folder)
    top = _files_in(files, "")
    present = [*top, *(path for module in _modules(files, top) for path in _files_in(files, module))]
    chosen = choose_files(present, lambda path: _read_whole(files, path))
    if not any(path.endswith(".safetensors") for path in chosen):
        check_names(chosen)  # says what is there instead, and how to convert it
    return ModelFolder(
        name=name or plain_name(files.root.name),
        files={path: files.path(path) for path in chosen},
        left_out=tuple(path for path in present if path not in chosen),
        header=inspect_model(_ChosenFiles(files, chosen)),
    )


def _files_in(files: FolderFiles, below: str) -> list[str]:
    folder = files.root / below
    if not folder.is_dir():
        return []
    found = [path for path in sorted(folder.iterdir()) if path.is_symlink() or not path.is_dir()]
    return [(PurePosixPath(below) / path.name).as_posix() for path in found if not path.name.startswith(".")]


def _modules(files: FolderFiles, top: Sequence[str]) -> Sequence[str]:
    return module_folders(lambda path: _read_whole(files, path) if path in top else None)


def _read_whole(files: FolderFiles, path: str) -> bytes:
    return files.read(path, 0, files.path(path).stat().st_size)


def plain_name(text: str) -> str:
    """A valid name from any text: lower case, with dashes in place of other characters."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return name[:64] or "model"
