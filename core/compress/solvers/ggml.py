"""ggml's own quantizer, in a process of its own: it ends the process where a number surprises it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from nightpress.core.compress.grids.gguf_ranges import relative_cost
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.gguf_types import GgufType

_RUNNER = Path(__file__).parents[1] / "runners" / "ggml_quantizer.py"


class GgmlQuantizer:
    """Rounds weights to types with uneven grids. A context manager: the process starts at the first weight, and ends with the block."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._said.close()

    def blocks(self, weight: Tensor, kind: GgufType, importance: Tensor) -> Tensor:
        """Round a weight [out, in] float32 → its blocks, uint8 [out, bytes of a row]. importance [in]: as in `fit_ranges`.

        Raises NightpressError: unsupported_format if llama.cpp is not installed, numerical_failure if the quantizer refuses the numbers.
        """
        rows, columns = weight.shape
        asked = {
            "type": int(GGMLQuantizationType[kind.name.upper()]),
            "rows": rows,
            "columns": columns,
            "row_bytes": kind.row_bytes(columns),
        }
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            for part in (relative_cost(importance), weight):
                process.stdin.write(part.cpu().contiguous().numpy().tobytes())
            process.stdin.flush()
        except BrokenPipeError:
            raise self._failed(kind) from None
        found = process.stdout.read(rows * asked["row_bytes"])
        if len(found) != rows * asked["row_bytes"]:
            raise self._failed(kind)
        return torch.from_numpy(np.frombuffer(found, np.uint8).reshape(rows, -1).copy())

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(_RUNNER), str(self._threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=kept,
            )
        return self._process

    def _failed(self, kind: GgufType) -> NightpressError:
        assert self._process is not None
        self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        said = lines[-1][:300] if lines else f"it ended with status {self._process.returncode}"
        if "llama-cpp-python is not installed" in said:
            return NightpressError(
                ErrorCode.UNSUPPORTED_FORMAT,
                f"The type {kind.name} is rounded to by llama.cpp's own quantizer, and llama-cpp-python is not installed here.",
                hint="Install it on the worker: pip install 'nightpress[llama]'. Or use a type from q2_k to q8_0.",
            )
        return NightpressError(
            ErrorCode.NUMERICAL_FAILURE,
            f"llama.cpp's quantizer could not round a weight to {kind.name}: {said}.",
            hint="Use another type; leave the layer to `ignore` if it is a single one.",
        )
