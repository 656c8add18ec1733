"""`report.json`: the comparison of the artifacts with the source. The Markdown card and the HTML page are made from this file alone.

`docs/report.schema.json` is the JSON Schema of this module. The schema has a version. A new optional field does not change it. The version
is raised when a field changes its meaning or becomes required; `read_report` then migrates older reports.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.profile import Profile

REPORT_FILE = "report.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Measurement(_Model):
    """A figure with its 95% interval. `change` is relative to the source, and is set if the examples are paired with the source's."""

    name: str  #: one of core.recipes.models.GATE_METRICS, or "class_f1"
    value: float
    low: float | None = None
    high: float | None = None
    n: int = Field(ge=0, description="examples behind the figure")
    unit: str = ""
    better: Literal["higher", "lower"]
    data: str  #: e.g. "builtin:prose"
    of: str = ""  #: part of the data, e.g. a class's name; "": all of it
    change: float | None = None  #: relative to the source, e.g. +0.03 for 3% more
    change_low: float | None = None
    change_high: float | None = None


class Speedup(_Model):
    """How many times as fast an artifact is as a base at one shape: the base's median latency divided by the artifact's.

    The base is the source, or the uncompressed model in the artifact's runtime. If `by_turns`, runs of both alternated, and low and high are the ends of the 95% interval. Else the two were timed one
    after the other, and low and high compare the 5th percentile of one with the 95th of the other. This includes the load of other
    programs.
    """

    value: float
    low: float
    high: float
    told_apart: bool  #: whether low and high lie on the same side of 1
    by_turns: bool
    source_p50_ms: float  #: the base's median in these runs


class Timing(_Model):
    """Latency of one batch shape: `repeats` timed runs after warm-up, in milliseconds."""

    batch: int
    length: int
    threads: int
    repeats: int
    p50_ms: float
    p95_ms: float
    throughput: float
    throughput_unit: str  #: "sequences/s" or "tokens/s"
    speedup: Speedup | None = None  #: only of an artifact
    over_uncompressed: Speedup | None = None  #: over the uncompressed model in the artifact's own runtime


class GenerationTiming(_Model):
    """Greedy decoding at one batch size and prompt length: `repeats` timed runs after warm-up. Tokens/s count the whole batch."""

    batch: int
    prompt: int
    tokens: int  #: generated in each row; the prefill gives the first
    cached: bool = (
        True  #: True: with the cache of the folder's settings; False: each token took a pass over the whole text
    )
    alike: float | None = None  #: without a cache: share of the tokens that are the same as with the folder's cache
    threads: int
    repeats: int
    prefill_p50_ms: float  #: from the call to the first token
    prefill_p95_ms: float
    prefill_tokens_per_s: float  #: of the prompt, at the median
    token_p50_ms: float  #: time of each token after the first, over all runs
    token_p95_ms: float
    decode_tokens_per_s: float  #: of the tokens after the first, in the median run
    decode_slowest: float  #: tokens/s of the slowest run
    decode_fastest: float
    peak_memory_bytes: int | None = (
        None  #: of the consumer's process during these runs; None if the system does not report it
    )
    prefill_speedup: Speedup | None = None  #: in tokens/s of the prompt; only of an artifact
    decode_speedup: Speedup | None = None  #: in tokens/s after the first token; only of an artifact
    prefill_over_uncompressed: Speedup | None = None  #: over the uncompressed model in the artifact's own runtime
    decode_over_uncompressed: Speedup | None = None


def speedup(ours: Timing, theirs: Timing, *, same_device: bool) -> Speedup | None:
    """Return the speedup of `ours` over `theirs`, two timings at one shape. None if they were never compared: on different devices.

    Reports of earlier versions contain only medians and 95th percentiles. Then low and high are computed from these.
    """
    if ours.speedup is not None or not same_device:
        return ours.speedup
    ends = theirs.p50_ms / ours.p95_ms, theirs.p95_ms / ours.p50_ms
    return _one_after_the_other(theirs.p50_ms / ours.p50_ms, *ends, theirs.p50_ms)


def decode_speedup(ours: GenerationTiming, theirs: GenerationTiming, *, same_device: bool) -> Speedup | None:
    """As `speedup`, for decoding: in tokens/s after the first token."""
    if ours.decode_speedup is not None or not same_device:
        return ours.decode_speedup
    ends = ours.decode_slowest / theirs.decode_fastest, ours.decode_fastest / theirs.decode_slowest
    return _one_after_the_other(ours.decode_tokens_per_s / theirs.decode_tokens_per_s, *ends, theirs.token_p50_ms)


def _one_after_the_other(value: float, low: float, high: float, source_p50_ms: float) -> Speedup:
    apart = low > 1 or high < 1
    return Speedup(value=value, low=low, high=high, told_apart=apart, by_turns=False, source_p50_ms=source_p50_ms)


class MeasuredOn(_Model):
    """Where a model's figures were taken: the device, the number type and the library."""

    device: Literal["cpu", "cuda"]
    name: str  #: of the processor or the GPU
    dtype: str  #: of the float weights as they were loaded, e.g. "bfloat16"; "" if the library decides
    consumer: str  #: e.g. "transformers 5.1.0"
    dispatched: bool = (
        False  #: the GPU didn't hold the model, so accelerate moved its parts: the speed is no serving speed
    )


class Verification(_Model):
    """The result of loading the artifact with its real consumer in a fresh process."""

    consumer: str
    passed: bool
    measure: str  #: what was compared, e.g. "cosine of pooled outputs"
    value: float
    bound: float
    layers: int | None = (
        None  #: layers whose answers were compared one by one with the pressed weights; None: not done for this format
    )
    layer_error: float | None = None  #: the largest relative error of a layer's answers
    seconds: float
    load_snippet: str  #: the lines that loaded it, as executed


class ServedTiming(_Model):
    """Requests that vLLM serves at a time, greedily: `repeats` timed rounds after warm-up. All requests of a round arrive together."""

    requests: int
    prompt: int  #: tokens of each request
    tokens: int  #: written for each request
    repeats: int
    tokens_per_s: float  #: written, of all requests, in the median round
    slowest: float  #: tokens/s of the slowest round
    fastest: float
    first_p50_ms: float  #: from a request's arrival to its first token
    first_p95_ms: float
    token_p50_ms: float  #: between the tokens of a request
    token_p95_ms: float
    speedup: Speedup | None = None  #: in time for a round, over the source in vLLM; only of an artifact


class Serving(_Model):
    """A model in vLLM."""

    measured_on: MeasuredOn
    verification: Verification | None = None  #: only of an artifact
    gap: float | None = (
        None  #: mean distance of the log-probabilities from those of the dequantized weights, in nats; only of an artifact
    )
    chosen: float | None = (
        None  #: share of the tokens that vLLM wrote which the dequantized weights would have chosen; only of an artifact
    )
    wrote: str = ""  #: a text that vLLM wrote, the continuation of a built-in text
    timings: tuple[ServedTiming, ...] = ()  #: empty if the recipe times nothing
    peak_memory_bytes: int | None = None  #: of vLLM's process; None: unknown
    peak_gpu_bytes: int | None = None  #: of the GPU's memory that vLLM took; None: it ran on the processor


#: Figures by which slices are put in order: of those that a slice has, the first.
RANKED_BY = (
    *("kl_divergence", "kendall_tau", "flips", "generation_match"),
    *("mean_error", "centred_cosine", "rank_correlation"),
)


class Slice(_Model):
    """The figures of one part of a data set: the examples with one value in the column `slice`."""

    name: str  #: the value, e.g. "code"
    data: str
    examples: int  #: rows, questions, queries or windows of text; a single one gives no figures, fewer than ten give no intervals
    measurements: tuple[Measurement, ...] = ()

    @property
    def ranked(self) -> Measurement | None:
        """The figure by which the slice is compared with others; None for a source, and for a slice without figures."""
        whole = {figure.name: figure for figure in self.measurements if not figure.of}
        return next((whole[name] for name in RANKED_BY if name in whole), None)


class Subject(_Model):
    """The source model or one artifact."""

    name: str  #: "source", or the artifact's folder
    format: str
    digest: str | None = None  #: `sha256:…` over the folder's file list, as the manifest has it
    size_bytes: int
    parameters: int | None = None
    measurements: tuple[Measurement, ...] = ()
    slices: tuple[Slice, ...] = ()  #: of data with a column `slice`; an artifact's: the farthest from the source first
    timings: tuple[Timing, ...] = ()
    generation: tuple[GenerationTiming, ...] = ()
    measurements_by: str | None = None  #: the earlier job that measured the source's outputs; None: this job
    measured_on: MeasuredOn | None = None  #: None in reports of earlier versions, which measured on the processor
    peak_memory_bytes: int | None = None  #: of the consumer's process; None: unknown
    peak_gpu_bytes: int | None = None  #: of the GPU's memory that the consumer took; None: it ran on the processor
    verification: Verification | None = None
    serving: Serving | None = None  #: None: vLLM was not run on it
    usage: str = (
        ""  #: a program that loads the artifact, gives it one text and prints the answer; empty if none is known
    )
    notes: tuple[str, ...] = ()  #: remarks, e.g. "slower than the source", "zeros save nothing in this format"


def same_device(first: Subject, second: Subject) -> bool:
    """Whether two models were measured on the same kind of device. Only then can their times and their memory be compared."""
    return _device(first) == _device(second)


def _device(subject: Subject) -> str:
    return "cpu" if subject.measured_on is None else subject.measured_on.device


class LayerEffect(_Model):
    """The effect of a pass on one tensor."""

    name: str
    bytes_before: int
    bytes_after: int
    relative_error: float  #: ‖w − ŵ‖ / ‖w‖ (Frobenius)
    sparsity: float | None = None


class Series(_Model):
    """A curve over training steps, or over another quantity that `x_label` names."""

    name: str  #: e.g. "train loss", "validation accuracy"
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str = "step"


class Tried(_Model):
    """A candidate of a search within a gate."""

    what: str  #: e.g. "12 of 42 layers in float"
    size_bytes: int  #: of its weights, or of its graph
    value: float  #: the figure, in the gate's unit
    observed: float  #: the unfavourable end of its interval, which is compared with the gate
    passed: bool
    unsure: bool  #: the figure keeps the gate, and the end of its interval misses it
    explanation: str
    seconds: float  #: for making and measuring it


class Within(_Model):
    """A pass's search for the smallest result that keeps a gate."""

    gate: str  #: as it was decided, e.g. "accuracy >= -1%"
    data: tuple[str, ...]  #: the data sets whose choosing half measured the candidates
    examples: int  #: of that half; of the smallest if there are several data sets
    candidates: int  #: results that it could choose from
    tried: tuple[Tried, ...]  #: in the order in which they were tried
    chosen: str
    kept: bool  #: whether the chosen result keeps the gate; if not, no candidate did, and this one came nearest
    beyond: Tried | None  #: the next smaller candidate, which misses the gate; None: the smallest candidate was chosen
    note: str = ""  #: what stood in for the gate's figure, and why

    def told(self) -> tuple[str, ...]:
        """Sentences for a reader: what was chosen, on which data, and what is on the other side of the gate."""
        ended = "It keeps the gate." if self.kept else "No result that was tried keeps the gate; this one came nearest."
        sentences = [
            f"Chosen: {self.chosen}. {ended}",
            f"Measured on {self.examples} examples of {', '.join(self.data)}: one half of the data chooses, and the artifacts are measured on the other. Of {self.candidates} possible results, {len(self.tried)} were tried.",
        ]
        if self.beyond is not None:
            sentences.append(f"On the other side of the gate: {self.beyond.what}, {self.beyond.explanation}.")
        return (*sentences, *([self.note] if self.note else []))


class PassRecord(_Model):
    index: int
    name: str
    package: str | None = None  #: package that the pass comes from; None: it is built in
    package_version: str | None = None
    seconds: float
    summary: dict[str, Any]
    layers: tuple[LayerEffect, ...] = ()
    series: tuple[Series, ...] = ()
    peak_gpu_bytes: int | None = None  #: largest use of the GPU's memory while the pass ran; None on a CPU
    warnings: tuple[str, ...] = ()  #: what the pass left out, and why
    within: Within | None = None  #: how the result was found, if the pass searched for it


class GateResult(_Model):
    """The result of a gate. The unfavourable end of the figure's interval decides, not its value."""

    gate: str  #: e.g. "perplexity <= +3%"
    artifact: str
    observed: float | None  #: None: the figure was not measured, so the gate is missed
    passed: bool
    explanation: str


class Screening(_Model):
    """Why a job ended right after its passes: on few texts, even the favourable end of an interval misses a gate."""

    reason: str
    gates: tuple[GateResult, ...]  #: `observed` is the favourable end of the interval


class DataUsed(_Model):
    """A data set that the job read."""

    ref: str  #: the data set's name in the recipe
    sha256: str  #: of the file that the job read
    license: str | None = None  #: None for data sets that are not built in: their license is not known here
    purpose: Literal["evaluation", "calibration"] | None = (
        None  #: only for built-in data sets, which have one text for each purpose
    )


class Report(_Model):
    schema_version: Literal[2] = 2
    job_id: str
    model: dict[
        str, Any
    ]  #: name, digest, architecture, model_type, task, parameters, size_bytes, license and other facts from its model card
    recipe: dict[str, Any]  #: normalised
    data: tuple[DataUsed, ...]
    environment: dict[str, Any]  #: versions, cpu, cores, threads, memory, gpu, seed
    source: Subject
    artifacts: tuple[Subject, ...]
    passes: tuple[PassRecord, ...]
    gates: tuple[GateResult, ...]
    verdict: Literal["accepted", "rejected"]
    phases: dict[str, float]  #: phase → seconds
    notes: tuple[str, ...] = ()
    screening: Screening | None = None  #: set if the job ended before its exports; then it has no artifacts
    profiles: tuple[Profile, ...] = ()  #: of the source and of the pressed model, if the recipe has the pass `profile`


def read_report(raw: bytes | str | Mapping[str, Any]) -> Report:
    """Read a report of this or an older version. Of a newer version, fields that are unknown here are ignored.

    Raises NightpressError(invalid_request) if it is no valid report.
    """
    try:
        tree = json.loads(raw) if isinstance(raw, bytes | str) else dict(raw)
        if not isinstance(tree, dict) or not isinstance(tree.get("schema_version"), int):
            raise ValueError("it has no schema_version")
        while step := _MIGRATIONS.get(tree["schema_version"]):
            tree = step(tree)
        if tree["schema_version"] > _VERSION:
            tree = tree | {"schema_version": _VERSION}
        return Report.model_validate(tree, extra="ignore")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _unreadable(f"{place or 'its top'}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(str(error)) from error


def _unreadable(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_REQUEST,
        f"That is no report that this version can read: {why[:300]}.",
        hint="Name a report.json, or a folder that holds one; one of a newer version may need a newer nightpress.",
    )


def _from_1(old: dict[str, Any]) -> dict[str, Any]:
    """Migrate a report from version 1, which had neither the data sets nor the artifacts' digests."""
    return old | {"schema_version": 2, "data": old.get("data", [])}


_VERSION = 2
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
