"""Running a model in the hands of its real consumer: a fresh process that loads the folder with the consumer's own library.

One process an artifact serves the verification, the evaluation and the timing. It sees no code of ours but its script and the measuring
module beside that, and nothing of this process's state.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.compress.checkpoint import disk_errors
from core.compress.evaluate.data import Sequences
from core.errors import ErrorCode, NightpressError
from core.recipes.costs import LOGIT_BYTES

_STDERR_READ = 32768
_STDERR_SHOWN = 2000


@dataclass(frozen=True)
class TokenSet:
    """Examples that a runner is to run, and what it is to keep of the outputs: `pooled`, `logits`, `last`, `tokens` or `generated`."""

    name: str
    kind: str
    sequences: Sequences
    compared: NDArray[np.bool_] | None = None  #: [N, S], where whole distributions are compared
    new_tokens: int = 0  #: `generated`: how many the source writes at most

    def rows(self, classes: int) -> int:
        """Rows a batch. classes: the width of one position's output."""
        length = int(self.sequences.ids.shape[1]) + self.new_tokens
        per_row = 4 * length * classes if self.kind in {"tokens", "last", "generated"} else 4 * length * 8192
        return max(1, min(16, LOGIT_BYTES // max(per_row, 1)))


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    repeats: int


@dataclass(frozen=True)
class Writing:
    """Greedy decoding to be timed."""

    batch: int
    prompt: int
    tokens: int
    repeats: int
    cached: bool = True  #: as the folder's settings say; else each token takes a pass over the whole text


@dataclass(frozen=True)
class Task:
    """What is run with every model of a job, so that all of them see the same."""

    name: str  #: header.task, or `image-classification`
    sets: tuple[TokenSet, ...]
    shapes: tuple[Shape, ...]
    timing_ids: NDArray[Any]  #: a run of tokens, or one image [C, H, W]
    pooling: str
    classes: int  #: words of the vocabulary or classes
    threads: int
    writings: tuple[Writing, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        widths = [int(one.sequences.ids.shape[1]) for one in self.sets]
        written = [one.prompt + one.tokens for one in self.writings]
        return max([*widths, *(shape.length for shape in self.shapes), *written])


@dataclass(frozen=True)
class Observed:
    """What a fresh process saw."""

    outputs: Mapping[str, NDArray[Any]] = field(repr=False)
    timings: tuple[dict[str, Any], ...]
    writings: tuple[dict[str, Any], ...]  #: none where the consumer can't decode
    peak_memory: int
    versions: dict[str, str]
    snippet: str  #: the lines that loaded the folder, as executed
    seconds: float
    outputs_file: Path


def run_consumer(
    runner: Path,
    folder: Path,
    task: Task,
    *,
    name: str,
    scratch: Path,
    reference: Path | None = None,
    progress: Callable[[float, str], None] = lambda _fraction, _text: None,
) -> Observed:
    """Load `folder` in a fresh process and run the task there.

    Raises NightpressError(verification_failed) with the end of its standard error when that fails, numerical_failure when an output
    is not finite.
    """
    started = time.monotonic()
    scratch.mkdir(parents=True, exist_ok=True)
    inputs, outputs, answer = scratch / "inputs.npz", scratch / f"{name}.npz", scratch / f"{name}.json"
    with disk_errors():
        if not inputs.exists():
            np.savez(inputs, **_arrays(task))  # type: ignore[arg-type]  # numpy's stub reads ** as its keyword
        request = scratch / f"{name}.request.json"
        request.write_text(
            json.dumps(
                {
                    "folder": folder.name,
                    "task": task.name,
                    "pooling": task.pooling,
                    "threads": task.threads,
                    "longest": task.longest,
                    "inputs": str(inputs.resolve()),
                    "outputs": str(outputs.resolve()),
                    "answer": str(answer.resolve()),
                    "reference": None if reference is None else str(reference.resolve()),
                    "sets": [
                        {
                            "name": one.name,
                            "kind": one.kind,
                            "rows": one.rows(task.classes),
                            "new_tokens": one.new_tokens,
                        }
                        for one in task.sets
                    ],
                    "timings": [vars(shape) for shape in task.shapes],
                    "writings": [vars(one) for one in task.writings],
                }
            )
        )
    _run(runner, request, folder.parent, task.threads, name, progress)
    with np.load(outputs) as archive:
        kept = {key: archive[key] for key in archive.files}
    _check_finite(kept, name)
    raw = json.loads(answer.read_bytes())
    return Observed(
        outputs=kept,
        timings=tuple(raw["timings"]),
        writings=tuple(raw["writings"]),
        peak_memory=int(raw["peak_memory_bytes"]),
        versions=raw["versions"],
        snippet=raw["snippet"],
        seconds=time.monotonic() - started,
        outputs_file=outputs,
    )


def consumer_name(versions: Mapping[str, str]) -> str:
    """E.g. `onnxruntime 1.32.0`: the library that a runner names last."""
    library, version = list(versions.items())[-1]
    return f"{library} {version}"


def _arrays(task: Task) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"timing.ids": task.timing_ids}
    for one in task.sets:
        arrays[f"{one.name}.ids"] = one.sequences.ids
        arrays[f"{one.name}.mask"] = one.sequences.mask
        if one.kind == "tokens":
            assert one.sequences.targets is not None
            assert one.compared is not None
            arrays[f"{one.name}.targets"] = one.sequences.targets
            arrays[f"{one.name}.compared"] = one.compared
    return arrays


def consumer_environment(threads: int, scratch: Path) -> dict[str, str]:
    """What a consumer's process sees of this one's environment: no Python settings, no network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin long at a barrier wait for one that isn't scheduled: beside anything else that runs, torch became ten
        # times slower. Threads that don't spin at all cost a quiet machine a third. This many rounds cost neither.
        "GOMP_SPINCOUNT": "3000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_MODULES_CACHE": str((scratch / "modules").resolve()),  # where transformers copies a folder's own code
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TMPDIR": str(scratch.resolve()),
    }


def _run(
    runner: Path, request: Path, beside: Path, threads: int, name: str, progress: Callable[[float, str], None]
) -> None:
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(runner), str(request.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=consumer_environment(threads, request.parent),
            cwd=beside,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(b"@progress "):
                    with contextlib.suppress(ValueError):
                        fraction, _, text = line[10:].decode(errors="replace").strip().partition(" ")
                        progress(float(fraction), text)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if status:
            errors.seek(0, os.SEEK_END)
            errors.seek(max(0, errors.tell() - _STDERR_READ))
            raise _failed(name, status, errors.read().decode(errors="replace"))


def _failed(name: str, status: int, stderr: str) -> NightpressError:
    whole = re.sub(r"([ -])\1{9,}", r"\1", stderr).strip()  # tables that are filled up to the width of their widest row
    cause, whole = _cause(whole), whole[-_STDERR_SHOWN:]
    if any(sign in whole for sign in ("No space left on device", "File too large", "Disk quota exceeded")):
        return NightpressError(
            ErrorCode.DISK_FULL,
            f"The disk filled up while {_subject(name)} was measured.",
            hint="Free space in the worker's data folder.",
        )
    if "IndexError: index out of range in self" in whole or "indices element out of data bounds" in whole:
        return NightpressError(
            ErrorCode.MALFORMED_MODEL,
            f"{_subject(name).capitalize()} was asked for a token or position that it has no embedding for.",
            hint="Compare the model's embeddings with `vocab_size` and `max_position_embeddings` in its config.json.",
            artifact=name,
            stderr=whole,
        )
    if "size mismatch" in whole or "ignore_mismatched_sizes" in whole:
        return NightpressError(
            ErrorCode.MALFORMED_MODEL,
            f"The weights of {_subject(name)} don't have the shapes that its config.json gives.",
            hint="Bring the config.json that the weights were saved with.",
            artifact=name,
            stderr=whole,
        )
    if status == -9 or "MemoryError" in cause or "Cannot allocate memory" in whole or "not enough memory" in whole:
        return NightpressError(
            ErrorCode.OUT_OF_MEMORY,
            f"The process that loaded {_subject(name)} ran out of memory.",
            hint="Use a worker with more memory, or evaluate with a smaller `batch` and `length`.",
            stderr=whole,
        )
    if (mismatch := _version_mismatch(whole)) is not None:
        return NightpressError(
            ErrorCode.VERIFICATION_FAILED,
            f"{_subject(name).capitalize()} is written in {mismatch[0]}; the library that is to load it here {mismatch[1]}.",
            hint="Bring the libraries to the versions in constraints.txt: what writes the file and what reads it must fit together.",
            artifact=name,
            stderr=whole,
        )
    if -status == signal.SIGILL:
        return NightpressError(
            ErrorCode.VERIFICATION_FAILED,
            f"The library that loads {_subject(name)} uses instructions that this processor doesn't have.",
            hint="Build it again on this machine, or for a plainer processor: llama-cpp-python with CMAKE_ARGS=-DGGML_NATIVE=OFF.",
            artifact=name,
            stderr=whole,
        )
    died = f"signal {-status}" if status < 0 else f"status {status}"
    hint = (
        "The model itself can't be run: check that its config.json and weights belong together."
        if name == "source"
        else "Leave this format out of `exports`, or use another pass: the library that loads it can't read this model in this form."
    )
    return NightpressError(
        ErrorCode.VERIFICATION_FAILED,
        f"{_subject(name).capitalize()} could not be run by its consumer, which ended with {died}: {cause[:500]}",
        hint=hint,
        artifact=name,
        stderr=whole,
    )


#: Where transformers' report on a load names why a tensor was not read; its last line only points at the report.
_UNREAD = re.compile(r"^(?P<why>.+)\nError: \w+ on tensors destined for (?P<tensor>\S+?)\.? ", re.MULTILINE)


def _cause(stderr: str) -> str:
    """What a process said of its end: the error itself, not the line that points at it."""
    if found := _UNREAD.search(stderr):
        return f"{found['tensor']} could not be read: {found['why']}"
    return stderr.splitlines()[-1] if stderr else "it said nothing"


#: What consumers say of a file that is newer than they are: its version, and, but for OpenVINO, the last one they read.
_TOO_NEW = (
    ("GGUF version", re.compile(r"GGUF file is version (\d+) but this software only supports up to version (\d+)")),
    ("opset", re.compile(r"from unsupported opset: opset(\d+)()")),
    ("IR version", re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")),
    ("opset", re.compile(r"[Oo]pset (\d+) is under development.*?till opset (\d+)", re.DOTALL)),
)


def _version_mismatch(stderr: str) -> tuple[str, str] | None:
    """E.g. `("IR version 99", "reads up to IR version 13")`, where that is why a file didn't load."""
    for what, pattern in _TOO_NEW:
        if found := pattern.search(stderr):
            return f"{what} {found[1]}", f"reads up to {what} {found[2]}" if found[2] else "does not know it"
    return None


def _subject(name: str) -> str:
    return "the source model" if name == "source" else f"the artifact {name}"


def _check_finite(outputs: Mapping[str, NDArray[Any]], name: str) -> None:
    for key, values in outputs.items():
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise NightpressError(
                ErrorCode.NUMERICAL_FAILURE,
                f"{_subject(name).capitalize()} gives outputs that are not finite: {bad} of {values.size} numbers ({key}).",
                hint="The weights overflow or hold NaN: check the model, or use a gentler pass."
                if name == "source"
                else "Use a gentler pass, or leave the layers that overflow to `ignore`.",
                artifact=name,
            )
