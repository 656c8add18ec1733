"""`report.json`: the comparison. Its schema is versioned; the Markdown card and the HTML page are drawn from it alone."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

REPORT_FILE = "report.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measurement(_Model):
    """A figure with its 95% interval. Where examples were paired with the source's, `change` is relative to the source."""

    name: str  #: "perplexity", "accuracy", "cosine", "top1_agreement", "kl_divergence"
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
    size_bytes: int
    parameters: int | None = None
    measurements: tuple[Measurement, ...] = ()
    timings: tuple[Timing, ...] = ()
    peak_memory_bytes: int | None = None
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
    seconds: float
    summary: dict[str, Any]
    layers: tuple[LayerEffect, ...] = ()
    series: tuple[Series, ...] = ()


class GateResult(_Model):
    """A gate is decided on the unfavourable end of the interval, not on the point."""

    gate: str  #: e.g. "perplexity <= +3%"
    artifact: str
    observed: float
    passed: bool
    explanation: str


class Report(_Model):
    schema_version: Literal[1] = 1
    job_id: str
    model: dict[str, Any]  #: name, digest, architecture, parameters, size_bytes, license
    recipe: dict[str, Any]  #: normalised
    environment: dict[str, Any]  #: versions, cpu, cores, threads, memory, gpu, seed
    source: Subject
    artifacts: tuple[Subject, ...]
    passes: tuple[PassRecord, ...]
    gates: tuple[GateResult, ...]
    verdict: Literal["accepted", "rejected"]
    phases: dict[str, float]  #: seconds by phase
    notes: tuple[str, ...] = ()
