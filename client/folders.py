"""Which files of a local model folder are sent, and whether they make a model: told before a byte is read in full."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.errors import ErrorCode, NightpressError
from core.recipes.header import ModelHeader
from core.recipes.inspect import check_names, inspect_model, is_model_file


@dataclass(frozen=True)
class ModelFolder:
    """The files to send, by their name at the server, and those that stay behind."""

    name: str
    files: dict[str, Path]
    left_out: tuple[str, ...]
    header: ModelHeader


class _Chosen:
    """The chosen files alone, as core.recipes.inspect wants to see a folder."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def names(self) -> Mapping[str, int]:
        return {name: path.stat().st_size for name, path in self._files.items()}

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self._files[path].open("rb") as source:
            source.seek(offset)
            return source.read(size)


def read_model_folder(folder: Path, name: str | None = None) -> ModelFolder:
    """Choose the model's files at the top of a folder, as `save_pretrained` lays them out, and check them as the server will.

    Raises NightpressError with the server's own codes: unsupported_format, malformed_model, unsupported_architecture.
    """
    if not folder.is_dir():
        raise NightpressError(
            ErrorCode.NOT_FOUND,
            f"{folder} is not a folder.",
            hint="Name the folder that holds config.json and model.safetensors.",
        )
    present = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    files = {name: path for name, path in present.items() if is_model_file(name)}
    if not any(one.endswith(".safetensors") for one in files):
        check_names(dict.fromkeys(present, 0))  # says what is there instead, and how to convert it
    return ModelFolder(
        name=name or plain_name(folder.resolve().name),
        files=files,
        left_out=tuple(one for one in present if one not in files),
        header=inspect_model(_Chosen(files)),
    )


def plain_name(text: str) -> str:
    """A name the service takes, from any text: lower case, dashes for all else."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return name[:64] or "model"
