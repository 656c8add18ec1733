"""Writes a model folder as a GGUF file with llama.cpp's own converter, then rounds the file with llama.cpp's own quantizer.

The argument is a file of JSON: `converter` (its folder), `model` (the model's folder), `config` (config keys that it reads and that this
version of transformers drops), `floats` (the type of floats), `converted` (the
file that the converter writes), and either null or {`file`, `type`, `threads`} for `rounded`, where `type` is the number of a file type.
"""

import ctypes
import json
import runpy
import sys
from pathlib import Path
from typing import Any


def convert(converter: Path, model: Path, target: Path, floats: str, config: dict[str, Any]) -> None:
    """Run llama.cpp's converter. It exits with a status other than 0, or raises, if it can't write the model.

    config: keys that are put over those that the converter reads from config.json.
    """
    sys.path.insert(0, str(converter))  # its package `gguf` is newer than the one from the index
    from conversion.base import ModelBase  # type: ignore[import-not-found]

    read = ModelBase.load_hparams
    ModelBase.load_hparams = staticmethod(lambda *args, **options: read(*args, **options) | config)
    sys.argv = [str(converter), str(model), "--outfile", str(target), "--outtype", floats]
    runpy.run_path(str(converter / "convert_hf_to_gguf.py"), run_name="__main__")


def quantize(source: Path, target: Path, kind: int, threads: int) -> None:
    """Round the matrices of a file as llama.cpp does for a type of file. Raises RuntimeError."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, threads
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama.cpp's quantizer failed with status {status}")


if __name__ == "__main__":
    asked: dict[str, Any] = json.loads(Path(sys.argv[1]).read_bytes())
    convert(Path(asked["converter"]), Path(asked["model"]), Path(asked["converted"]), asked["floats"], asked["config"])
    if asked["rounded"] is not None:
        chosen = asked["rounded"]
        quantize(Path(asked["converted"]), Path(chosen["file"]), chosen["type"], chosen["threads"])
