"""Files by llama.cpp's own converter, for families whose names and metadata are not ours.

The converter comes with llama-cpp-python's source, and `make llama` puts it beside the environment's packages. It runs in a process of its
own, like a consumer. Where matrices are to be rounded, llama.cpp's quantizer follows, with its own choice of types for the tensors.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import torch

from nightpress.core.compress.export.consumer_environment import consumer_environment
from nightpress.core.compress.model.checkpoint import disk_errors, sync_folder
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.llama_converter import older_keys

CONVERTER = Path(sys.prefix) / "share" / "llama.cpp"  #: where `make llama` puts it
_RUNNER = Path(__file__).parents[2] / "runners" / "llamacpp_converter.py"
_FLOATS = frozenset({"f32", "f16"})  #: types that the converter itself writes


def convert(model_dir: Path, file: Path, header: ModelHeader, kind: gguf.LlamaFileType, *, weights: str) -> None:
    """Write the file and its folder. kind: the type of a file whose matrices have the type `weights`.

    Raises NightpressError: unsupported_format if the converter is not installed, unsupported_architecture with what it says if it can't
    write the model.
    """
    if not (CONVERTER / "convert_hf_to_gguf.py").is_file():
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"A {header.model_type} is written as GGUF by llama.cpp's converter, and the worker has none in {CONVERTER}.",
            hint="Run `make llama` on the worker, which installs the converter beside llama-cpp-python.",
        )
    scratch = file.parent / "converting"
    with disk_errors():
        scratch.mkdir(parents=True)
        request, floats = scratch / "request.json", scratch / "floats.gguf"
        asked = {
            "converter": str(CONVERTER),
            "model": str(model_dir.resolve()),
            "config": older_keys(header),
            "floats": weights if weights in _FLOATS else _widest(header),
            "converted": str((file if weights in _FLOATS else floats).resolve()),
            "rounded": None
            if weights in _FLOATS
            else {"file": str(file.resolve()), "type": int(kind), "threads": torch.get_num_threads()},
        }
        request.write_text(json.dumps(asked))
        run = subprocess.run(
            [sys.executable, "-I", "-B", str(_RUNNER), str(request.resolve())],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=consumer_environment(1, scratch),
            cwd=scratch,
        )
        shutil.rmtree(scratch)
        if run.returncode or not file.is_file():
            raise _failed(header, run.returncode, run.stderr.decode(errors="replace"))
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        sync_folder(file.parent)


def _widest(header: ModelHeader) -> str:
    """The floats that are rounded afterwards: those of the model."""
    return "f32" if any(tensor.dtype == "F32" and len(tensor.shape) > 1 for tensor in header.tensors) else "auto"


def _failed(header: ModelHeader, status: int, said: str) -> NightpressError:
    if "No space left on device" in said:
        return NightpressError(
            ErrorCode.DISK_FULL,
            "The disk filled up while llama.cpp's converter wrote the model.",
            hint="Free space in the worker's data folder.",
        )
    lines = [line for line in said.strip().splitlines() if line.strip() and not line.startswith("INFO:")]
    return NightpressError(
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        f"llama.cpp's converter could not write this {header.architecture}: {lines[-1][:300] if lines else f'it ended with status {status}'}",
        hint="Leave gguf out of `exports`.",
    )
