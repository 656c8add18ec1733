"""`report.json`: the comparison. Its schema is versioned; the Markdown card and the HTML page are drawn from it alone.

`docs/report.schema.json` is this module as a JSON Schema. A field may be added without a new version; a version is raised when a field
changes its meaning or becomes required, and `read_report` then brings older reports up to it.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.profile import Profile

REPORT_FILE = "report.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measurement(_Model):
    """A figure with its 95% interval. Where examples were paired with the source's, `change` is relative to the source."""

    name: str  #: one of core.recipes.models.GATE_METRICS, or "class_f1"
    value: float
    low: float | None = None
    high: float | None = None
    n: int = Field(ge=0, description="examples behind the figure")
    unit: str = ""
    better: Literal["higher", "lower"]
    data: str  #: e.g. "builtin:prose"
    of: str = ""  #: what part of the data, e.g. a class's name
    change: float | None = None  #: relative to the source, e.g. +0.03 for 3% more
    change_low: float | None = None
    change_high: float | None = None


class Speedup(_Model):
    """How many times as fast as the source an artifact is at one shape: the source's median wait over the artifact's.

    By turns, low and high are the ends of the 95% interval, from runs of both that took turns. Else both were timed one after the
    other, and low and high compare the 5th percentile of either with the other's 95th: whatever else ran meanwhile is in that.
    """

    value: float
    low: float
    high: float
    told_apart: bool  #: low and high lie on one side of 1
    by_turns: bool
    source_p50_ms: float  #: the source's median in these runs


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
    speedup: Speedup | None = None  #: of an artifact


class GenerationTiming(_Model):
    """Greedy decoding at one batch and prompt: `repeats` timed runs after warm-up. Tokens/s count those of the whole batch."""

    batch: int
    prompt: int
    tokens: int  #: written by each row, the first by the prefill
    cached: bool = True  #: as the folder's settings say; False: each token took a pass over the whole text
    alike: float | None = None  #: without a cache: share of the tokens that the folder's cache wrote too
    threads: int
    repeats: int
    prefill_p50_ms: float  #: from the call to the first token
    prefill_p95_ms: float
    prefill_tokens_per_s: float  #: of the prompt, at the median
    token_p50_ms: float  #: wait for one of the tokens after the first, over all runs
    token_p95_ms: float
    decode_tokens_per_s: float  #: of the tokens after the first: the median run
    decode_slowest: float  #: tokens/s of the slowest run
    decode_fastest: float
    peak_memory_bytes: int | None = (
        None  #: of the consumer's process during these runs; None where the system can't say
    )
    prefill_speedup: Speedup | None = None  #: of an artifact, in tokens/s of the prompt
    decode_speedup: Speedup | None = None  #: of an artifact, in tokens/s after the first


def speedup(ours: Timing, theirs: Timing) -> Speedup:
    """Of two timings at one shape. Reports of earlier versions tell medians and 95th percentiles alone: the spread is taken from these."""
    if ours.speedup is not None:
        return ours.speedup
    ends = theirs.p50_ms / ours.p95_ms, theirs.p95_ms / ours.p50_ms
    return _one_after_the_other(theirs.p50_ms / ours.p50_ms, *ends, theirs.p50_ms)


def decode_speedup(ours: GenerationTiming, theirs: GenerationTiming) -> Speedup:
    """The same of decoding, in tokens/s after the first."""
    if ours.decode_speedup is not None:
        return ours.decode_speedup
    ends = ours.decode_slowest / theirs.decode_fastest, ours.decode_fastest / theirs.decode_slowest
    return _one_after_the_other(ours.decode_tokens_per_s / theirs.decode_tokens_per_s, *ends, theirs.token_p50_ms)


def _one_after_the_other(value: float, low: float, high: float, source_p50_ms: float) -> Speedup:
    apart = low > 1 or high < 1
    return Speedup(value=value, low=low, high=high, told_apart=apart, by_turns=False, source_p50_ms=source_p50_ms)


class Verification(_Model):
    """What a fresh process saw that loaded the artifact with its real consumer."""

    consumer: str
    passed: bool
    measure: str  #: what was compared, e.g. "cosine of pooled outputs"
    value: float
    bound: float
    seconds: float
    load_snippet: str  #: the lines that loaded it, as executed


class Subject(_Model):
    """The source model or one artifact."""

    name: str  #: "source", or the artifact's folder
    format: str
    digest: str | None = None  #: `sha256:…` over the folder's file list, as the manifest has it
    size_bytes: int
    parameters: int | None = None
    measurements: tuple[Measurement, ...] = ()
    timings: tuple[Timing, ...] = ()
    generation: tuple[GenerationTiming, ...] = ()
    peak_memory_bytes: int | None = None  #: of the consumer's process; None: unknown
    verification: Verification | None = None
    notes: tuple[str, ...] = ()  #: honest remarks: "slower than the source", "zeros save nothing in this format"


class LayerEffect(_Model):
    """What a pass did to one tensor."""

    name: str
    bytes_before: int
    bytes_after: int
    relative_error: float  #: ‖w − ŵ‖ / ‖w‖ (Frobenius)
    sparsity: float | None = None


class Series(_Model):
    """A curve over the steps of a training, or over whatever else `x` counts."""

    name: str  #: e.g. "train loss", "validation accuracy"
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str = "step"


class PassRecord(_Model):
    index: int
    name: str
    package: str | None = None  #: that the pass comes from; None: it is one of Nightpress' own
    package_version: str | None = None
    seconds: float
    summary: dict[str, Any]
    layers: tuple[LayerEffect, ...] = ()
    series: tuple[Series, ...] = ()
    peak_gpu_bytes: int | None = None  #: of the GPU's memory while it ran; None on a CPU
    warnings: tuple[str, ...] = ()  #: what it left out, and why


class GateResult(_Model):
    """A gate is decided on the unfavourable end of the interval, not on the point."""

    gate: str  #: e.g. "perplexity <= +3%"
    artifact: str
    observed: float | None  #: None: it was not measured, and so is missed
    passed: bool
    explanation: str


class DataUsed(_Model):
    """A data set that the job read."""

    ref: str  #: as the recipe calls it
    sha256: str  #: of the file as it was handed to the job
    license: str | None = None  #: of built-in sets; of others only their owner knows
    purpose: Literal["evaluation", "calibration"] | None = None  #: of built-in sets, which have a text for each


class Report(_Model):
    schema_version: Literal[2] = 2
    job_id: str
    model: dict[
        str, Any
    ]  #: name, digest, architecture, model_type, task, parameters, size_bytes, license and what else its card says
    recipe: dict[str, Any]  #: normalised
    data: tuple[DataUsed, ...]
    environment: dict[str, Any]  #: versions, cpu, cores, threads, memory, gpu, seed
    source: Subject
    artifacts: tuple[Subject, ...]
    passes: tuple[PassRecord, ...]
    gates: tuple[GateResult, ...]
    verdict: Literal["accepted", "rejected"]
    phases: dict[str, float]  #: seconds by phase
    notes: tuple[str, ...] = ()
    profiles: tuple[Profile, ...] = ()  #: of the source and of the pressed model, where the recipe asks for `profile`


def read_report(raw: bytes | str | Mapping[str, Any]) -> Report:
    """A report of this or an older version; of a newer one, what this version knows of it. Raises NightpressError(invalid_request)."""
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
    """Version 1 named neither its data nor the digests of its artifacts."""
    return old | {"schema_version": 2, "data": old.get("data", [])}


_VERSION = 2
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
