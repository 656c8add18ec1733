"""Run a model in its real consumer: a fresh process that loads the folder with the consumer's own library.

For transformers, it is a fork of a process that has imported the library and nothing of ours; see nursery.py.
Each artifact has one process for the verification, the evaluation and the timing. Of our code, it runs only its script and the measuring
module in the same folder. It shares no state with this process. If both fit into memory, an artifact and its source are timed by turns, so
that other work of the machine slows both alike.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.export import nursery
from nightpress.core.compress.export.consumer_environment import Device, consumer_environment, runner_environment
from nightpress.core.compress.export.consumer_faults import check_finite, failed
from nightpress.core.compress.export.parts import join_outputs, variables_of_others
from nightpress.core.compress.export.task import Task, TimedGeneration, TimedServing, TimedShape, add_arrays
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.processor import bfloat16_held_down

_STDERR_READ = 32768  #: bytes at the end of a process's standard error
_SHAPE_SECONDS = 8.0  #: longest time for one shape and one model
_FEWEST = 5  #: runs of a shape, even if they take longer than _SHAPE_SECONDS
_WRITING_SECONDS = 20.0  #: longest time for one kind of decoding and one model
_FEWEST_WRITINGS = 3  #: runs of decoding, even if they take longer than _WRITING_SECONDS
_TELL_EVERY_S = 3.0
Timed = TimedShape | TimedGeneration | TimedServing


@dataclass(frozen=True)
class Observed:
    """The outputs and timings of a fresh process."""

    outputs: Mapping[str, NDArray[Any]] = field(repr=False)
    timings: tuple[dict[str, Any], ...]
    writings: tuple[dict[str, Any], ...]  #: empty if the consumer can't decode
    peak_memory: int | None  #: bytes; None if the system does not report it
    versions: dict[str, str]
    snippet: str  #: the lines that loaded the folder, as executed
    seconds: float
    outputs_file: Path
    beside: "ModelRuns | None" = None  #: the source's runs, if both took turns
    uncompressed: "ModelRuns | None" = (
        None  #: the runs of the uncompressed model in the same runtime, if both took turns
    )
    peak_gpu: int | None = None  #: bytes of the GPU's memory; None: it ran on the processor
    loaded_as: Mapping[str, Any] = field(
        default_factory=lambda: {"device": "cpu"}
    )  #: as the runner says; see runners/measure.py
    wrote: str = ""  #: a text that the model wrote; empty if the runner gives none


@dataclass(frozen=True)
class ModelRuns:
    """The timed runs of one model in milliseconds, for each shape and each kind of decoding."""

    timings: tuple[dict[str, Any], ...]
    writings: tuple[dict[str, Any], ...]
    peak_memory: int | None = None  #: bytes, of the process until the end of these runs; None: unknown
    peak_gpu: int | None = None  #: bytes of the GPU's memory


class Consumer:
    """A fresh process that loads a folder, runs the task's examples, and then times one run for each request.

    A context manager: the process is killed at the end of the block.
    """

    def __init__(
        self,
        runner: Path,
        folder: Path,
        task: Task,
        *,
        name: str,
        scratch: Path,
        device: Device = "cpu",
        reference: Path | None = None,
        probes: Mapping[str, float] | None = None,
        renumber: Path | None = None,
        stem: str | None = None,
        progress: Callable[[float, str], None] = lambda _fraction, _text: None,
        python: Path | None = None,
        variables: Mapping[str, str] | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Start the process. name: the artifact's name, or `source`. stem: the stem of its files in `scratch`; None: the name.

        python: the interpreter of another environment; None: this one. variables: further environment variables.
        part: number of the process's part of the examples, and how many parts there are.

        device: cuda only for the runner of transformers. reference: the outputs of the source, for the artifact to be compared with.
        probes: layers to be asked one by one, and the factor of each; see probes.py. renumber: of a model whose vocabulary was cut.
        """
        self.name, self._progress, self._started = name, progress, time.monotonic()
        self.peak_memory: int | None = None  #: bytes, of the process until now; None if the system does not report it
        self.peak_gpu: int | None = None  #: bytes of the GPU's memory until now; None: it runs on the processor
        self.decodes = False  #: whether its decoding can be timed; set by `run`
        scratch.mkdir(parents=True, exist_ok=True)
        stem = stem or name
        self._outputs, self._answer = scratch / f"{stem}.npz", scratch / f"{stem}.json"
        request = scratch / f"{stem}.request.json"
        with disk_errors():
            files = {
                "inputs": _write_inputs(task, scratch),
                "outputs": self._outputs,
                "answer": self._answer,
                "reference": reference,
                "renumber": renumber,
            }
            request.write_text(
                json.dumps(
                    {
                        "folder": folder.name,
                        "device": device,
                        "probes": dict(probes or {}),
                        "part": part,
                        "float32": bfloat16_held_down(),
                        **task.request(),
                        **{key: None if file is None else str(file.resolve()) for key, file in files.items()},
                    }
                )
            )
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - the process writes into it as long as it lives
        if runner.name in nursery.RUNNERS:
            self._process: subprocess.Popen[bytes] | nursery.Fork = nursery.start(
                runner,
                request.resolve(),
                cwd=folder.parent,
                errors=self._errors,
                environment=runner_environment(device, task.threads, scratch) | dict(variables or {}),
            )
        else:
            self._process = subprocess.Popen(
                [str(python or sys.executable), "-I", "-B", str(runner), str(request.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=consumer_environment(task.threads, scratch) | dict(variables or {}),
                cwd=folder.parent,
            )

    def __enter__(self) -> "Consumer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def run(self) -> Observed:
        """Wait until all examples have run, and return their outputs.

        Raises NightpressError: if the process ends early, the error of `consumer_faults.failed`, usually verification_failed, with the end
        of the standard error; numerical_failure if an output is not finite.
        """
        self._wait_for(b"@ready ")
        with np.load(self._outputs) as archive:
            kept = {key: archive[key] for key in archive.files}
        check_finite(kept, self.name)
        raw = json.loads(self._answer.read_bytes())
        self.decodes = bool(raw["decodes"])
        return Observed(
            outputs=kept,
            timings=(),
            writings=(),
            peak_memory=self.peak_memory,
            versions=raw["versions"],
            snippet=raw["snippet"],
            seconds=self.seconds,
            outputs_file=self._outputs,
            peak_gpu=self.peak_gpu,
            loaded_as=raw["loaded_as"],
            wrote=raw["wrote"],
        )

    @property
    def seconds(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._started

    def time(self, wanted: Timed) -> dict[str, Any]:
        """Run once and return the milliseconds. Raises the errors of `run`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended, and its error is read below
            self._process.stdin.write(json.dumps(vars(wanted)).encode() + b"\n")
            self._process.stdin.flush()
        return self._wait_for(b"@timed ")

    def _wait_for(self, sign: bytes) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(sign):
                found: dict[str, Any] = json.loads(line[len(sign) :])
                self.peak_memory = max(found.pop("process_peak_bytes") or 0, self.peak_memory or 0) or None
                self.peak_gpu = max(found.pop("gpu_peak_bytes") or 0, self.peak_gpu or 0) or None
                return found
            if line.startswith(b"@progress "):
                with contextlib.suppress(ValueError):
                    fraction, _, text = line[10:].decode(errors="replace").strip().partition(" ")
                    self._progress(float(fraction), text)
        status = self._process.wait()
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - _STDERR_READ))
        raise failed(self.name, status, self._errors.read().decode(errors="replace"))


def _write_inputs(task: Task, scratch: Path) -> Path:
    """Write a task's arrays, unless another process of the job has the same. Processes of one job have different tasks: one may only be timed."""
    arrays, digest = task.arrays(), hashlib.sha256()
    add_arrays(digest, arrays)
    file = scratch / f"inputs-{digest.hexdigest()[:16]}.npz"
    if not file.exists():
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub reads ** as its keyword
    return file


#: Peak memory of an artifact's process in bytes → the consumer of another model, or None if memory does not hold it, too.
Beside = Callable[[int | None], Consumer | None]


def run_consumer(
    runner: Path,
    folder: Path,
    task: Task,
    *,
    name: str,
    scratch: Path,
    device: Device = "cpu",
    reference: Path | None = None,
    probes: Mapping[str, float] | None = None,
    renumber: Path | None = None,
    stem: str | None = None,
    parts: int = 1,
    beside: Beside = lambda _peak: None,
    uncompressed: Beside = lambda _peak: None,
    progress: Callable[[float, str], None] = lambda _fraction, _text: None,
) -> Observed:
    """Load `folder` in a fresh process and run the task there.

    parts: processes that share out the examples, each with the whole model, on GPUs each on its own. Only the first is timed.
    beside, uncompressed: return the loaded consumers of the source, and of the uncompressed model in the same runtime, to take turns with.
    The artifact is timed without those that are None. Raises the errors of `Consumer.run`.
    """
    timed = len(task.shapes) + len(task.writings)
    share = len(task.sets) / max(1, len(task.sets) + timed)  # the part of the progress that is for the sets
    load = partial(
        Consumer, runner, folder, name=name, scratch=scratch, device=device, reference=reference, renumber=renumber
    )
    with load(
        task, probes=probes, stem=stem, part=(0, parts), progress=lambda done, text: progress(share * done, text)
    ) as consumer:
        with contextlib.ExitStack() as stack:
            helpers = []
            for at, variables in enumerate(variables_of_others(parts, device), start=1):
                own = load(task.only_examples, stem=f"{stem or name}-part{at}", part=(at, parts), variables=variables)
                helpers.append(stack.enter_context(own))
            seen = consumer.run()
            if helpers:
                seen = _joined(seen, [helper.run() for helper in helpers])
        others = [start(consumer.peak_memory) if timed else None for start in (beside, uncompressed)]
        models = [consumer, *(other for other in others if other is not None)]
        ours, *theirs = _take_turns(task, models, lambda fraction, text: progress(share + (1 - share) * fraction, text))
        return replace(
            seen,
            timings=ours.timings,
            writings=ours.writings,
            beside=theirs.pop(0) if others[0] is not None else None,
            uncompressed=theirs.pop(0) if others[1] is not None else None,
            peak_memory=consumer.peak_memory,
            peak_gpu=max(filter(None, (seen.peak_gpu, consumer.peak_gpu)), default=None),
            seconds=consumer.seconds,
        )


def _joined(first: Observed, others: Sequence[Observed]) -> Observed:
    """What several processes observed, each for its part of the examples."""
    seen = (first, *others)
    outputs = join_outputs(first.outputs_file, [part.outputs for part in seen])
    return replace(first, outputs=outputs, peak_gpu=max(part.peak_gpu or 0 for part in seen) or None)


def _take_turns(
    task: Task, models: Sequence[Consumer], progress: Callable[[float, str], None]
) -> tuple[ModelRuns, ...]:
    """Time every shape and every kind of decoding, with runs of the models by turns."""
    decode = all(model.decodes for model in models[:1])
    wanted: list[Timed] = [*task.shapes, *(task.writings if decode else ())]
    runs: list[list[list[dict[str, Any]]]] = []
    for at, request in enumerate(wanted):
        span = partial(_tell_share, progress, at, len(wanted), _describe(request))
        span(0.0)
        runs.append(timed_rounds(request, models, span))
    shapes = len(task.shapes)
    return tuple(
        ModelRuns(
            timings=tuple(
                _shape_runs(request, found[at]) for request, found in zip(wanted[:shapes], runs, strict=False)
            ),
            writings=_generation_runs(wanted[shapes:], [found[at] for found in runs[shapes:]]),
            peak_memory=model.peak_memory,
            peak_gpu=model.peak_gpu,
        )
        for at, model in enumerate(models)
    )


def _tell_share(progress: Callable[[float, str], None], at: int, of: int, what: str, share: float) -> None:
    """Tell the progress of the part `at` of `of` equal parts."""
    progress((at + share) / of, what)


def _describe(request: Timed) -> str:
    if isinstance(request, TimedShape):
        return f"timing {request.batch} × {request.length}"
    if isinstance(request, TimedServing):
        return f"serving {request.requests} × {request.prompt}"
    return f"decoding {request.batch} × {request.prompt}{'' if request.cached else ' without a cache'}"


def timed_rounds(
    request: Timed, models: Sequence[Consumer], tell: Callable[[float], None]
) -> list[list[dict[str, Any]]]:
    """The runs of each model, [models][rounds], after one warm-up run each. Every second round has the reverse order of models.

    tell: gets the share of the rounds that are done, every few seconds.
    """
    fewest, seconds = (
        (_FEWEST, _SHAPE_SECONDS) if isinstance(request, TimedShape) else (_FEWEST_WRITINGS, _WRITING_SECONDS)
    )
    warm = [model.time(request) for model in models]
    found: list[list[dict[str, Any]]] = [[] for _ in models]
    told = time.monotonic()
    deadline = told + seconds * len(models)
    while len(found[0]) < request.repeats and (len(found[0]) < fewest or time.monotonic() < deadline):
        order = list(zip(models, found, strict=True))
        for model, runs in order if len(found[0]) % 2 == 0 else reversed(order):
            runs.append(model.time(request))
        if time.monotonic() - told > _TELL_EVERY_S:
            told = time.monotonic()
            tell(len(found[0]) / request.repeats)
    if isinstance(request, TimedGeneration):  # the memory of the warm-up run counts, too
        for first, runs in zip(warm, found, strict=True):
            runs[0]["peak_memory_bytes"] = _larger(first["peak_memory_bytes"], runs[0]["peak_memory_bytes"])
    return found


def _larger(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)


def _shape_runs(shape: Timed, runs: list[dict[str, Any]]) -> dict[str, Any]:
    assert isinstance(shape, TimedShape)
    return {"batch": shape.batch, "length": shape.length, "milliseconds": [run["milliseconds"] for run in runs]}


def _generation_runs(wanted: Sequence[Timed], runs: Sequence[list[dict[str, Any]]]) -> tuple[dict[str, Any], ...]:
    """The milliseconds before each token [runs][tokens] and the peak memory.

    Without a cache, also `alike`: the share of tokens that are the same as with a cache.
    """
    texts: dict[tuple[int, int], NDArray[Any]] = {}
    found = []
    for request, of_request in zip(wanted, runs, strict=True):
        assert isinstance(request, TimedGeneration)
        text = np.asarray(of_request[0]["text"])
        cached = texts.setdefault((request.batch, request.prompt), text)
        peaks = [run["peak_memory_bytes"] for run in of_request]
        written = {
            **vars(request),
            "milliseconds": [run["milliseconds"] for run in of_request],
            "peak_memory_bytes": None if None in peaks else max(peaks),
        }
        if not request.cached:
            written["alike"] = float((cached[:, : request.tokens] == text).mean())
        found.append(written)
    return tuple(found)


def consumer_name(versions: Mapping[str, str]) -> str:
    """E.g. `onnxruntime 1.32.0`: the last library in a runner's versions."""
    library, version = list(versions.items())[-1]
    return f"{library} {version}"
