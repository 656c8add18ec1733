"""Find the cause when a consumer's process ended early or returned numbers that are not finite, and raise the matching error."""

import re
import signal
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.errors import ErrorCode, NightpressError

_SHOWN = 2000


def failed(name: str, status: int, stderr: str) -> NightpressError:
    whole = re.sub(r"([ -])\1{9,}", r"\1", stderr).strip()  # shortens the padding in tables
    cause, whole = _cause(whole), whole[-_SHOWN:]
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


#: The place in transformers' loading report that says why a tensor was not read. The last line of the output only refers to the report.
_UNREAD = re.compile(r"^(?P<why>.+)\nError: \w+ on tensors destined for (?P<tensor>\S+?)\.? ", re.MULTILINE)


#: The last error of a traceback in vLLM, which names its process before each line. It may go on over several lines.
_RANKED = re.compile(r"^\[rank\d+\]: (?P<said>[\w.]*(?:Error|Exception)\b.*(?:\n.*)*)", re.MULTILINE)


def _cause(stderr: str) -> str:
    """The error that ended a process. The last line of transformers, or of vLLM, is not the error, so the error itself is searched."""
    if found := _UNREAD.search(stderr):
        return f"{found['tensor']} could not be read: {found['why']}"
    if ranked := list(_RANKED.finditer(stderr)):
        lines = (re.sub(r"^\[rank\d+\]: *", "", line) for line in ranked[-1]["said"].splitlines())
        return " ".join(line.strip() for line in lines if line.strip() and "Loading safetensors" not in line)
    return stderr.splitlines()[-1] if stderr else "it said nothing"


#: Messages of consumers about files of a version that is too new for them. Groups: the file's version and the newest version that the
#: consumer reads. OpenVINO does not name the second.
_TOO_NEW = (
    ("GGUF version", re.compile(r"GGUF file is version (\d+) but this software only supports up to version (\d+)")),
    ("opset", re.compile(r"from unsupported opset: opset(\d+)()")),
    ("IR version", re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")),
    ("opset", re.compile(r"[Oo]pset (\d+) is under development.*?till opset (\d+)", re.DOTALL)),
)


def _version_mismatch(stderr: str) -> tuple[str, str] | None:
    """E.g. `("IR version 99", "reads up to IR version 13")`, if this is why a file could not be loaded; else None."""
    for what, pattern in _TOO_NEW:
        if found := pattern.search(stderr):
            return f"{what} {found[1]}", f"reads up to {what} {found[2]}" if found[2] else "does not know it"
    return None


def _subject(name: str) -> str:
    return "the source model" if name == "source" else f"the artifact {name}"


def check_finite(outputs: Mapping[str, NDArray[Any]], name: str) -> None:
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
