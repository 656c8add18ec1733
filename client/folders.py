"""Which files of a local model folder are sent, and under which name."""

import re
from dataclasses import dataclass
from pathlib import Path

from client.errors import ClientError

#: Everything a worker may open, and nothing that could carry code; the server refuses all else.
_SENT = re.compile(r".*\.safetensors|.*\.json|.*\.txt|.*\.model")


@dataclass(frozen=True)
class ModelFolder:
    """The files to send, by their name at the server, and those that stay behind."""

    name: str
    files: dict[str, Path]
    left_out: tuple[str, ...]


def read_model_folder(folder: Path, name: str | None = None) -> ModelFolder:
    """Choose the model's files at the top of a folder, as `save_pretrained` lays them out.

    Raises ClientError where there is no model to send.
    """
    if not folder.is_dir():
        raise ClientError(
            f"{folder} is not a folder.", hint="Name the folder that holds config.json and model.safetensors."
        )
    present = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files = {path.name: path for path in present if _SENT.fullmatch(path.name)}
    if not any(one.endswith(".safetensors") for one in files):
        legacy = [path.name for path in present if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
        hint = (
            f"{legacy[0]} can carry code and is never loaded; save the model with `model.save_pretrained(folder)` of transformers first."
            if legacy
            else "Name the folder that holds config.json and model.safetensors."
        )
        raise ClientError(f"{folder} holds no .safetensors file.", hint=hint)
    return ModelFolder(
        name=name or plain_name(folder.resolve().name),
        files=files,
        left_out=tuple(path.name for path in present if path.name not in files),
    )


def plain_name(text: str) -> str:
    """A name the service takes, from any text: lower case, dashes for all else."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return name[:64] or "model"
