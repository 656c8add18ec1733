"""Compares artifacts of one or more jobs on size, latency and quality, for the command line and the web pages. Plain data, no I/O."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nightpress.core.handoff.report import Measurement, Report, Subject

#: The source's own value of each figure that compares outputs with the source's.
_OF_ITSELF = {
    **dict.fromkeys(("cosine", "centred_cosine", "top1_agreement", "label_agreement"), 1.0),
    **dict.fromkeys(("rank_correlation", "correlation", "generation_match", "prefix_match"), 1.0),
    **dict.fromkeys(("kl_divergence", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max", "rms_dp"), 0.0),
    **dict.fromkeys(("flips", "right_to_wrong"), 0.0),
    **dict.fromkeys(("mean_error", "largest_error"), 0.0),
}


@dataclass(frozen=True)
class Point:
    """An artifact, or a job's source, with its size, latency and quality."""

    job_id: str
    model: str
    recipe: str
    artifact: str  #: "source", or the artifact's name
    size_bytes: int
    latency_ms: float | None  #: median at the comparison's shape
    quality: float | None
    quality_low: float | None
    quality_high: float | None
    #: The job's verdict. It notes if this artifact passed its own gates in a rejected job. "" for a source.
    verdict: str
    #: Label of a point that is at least as good on every scale, and better on at least one; "" if there is none.
    dominated_by: str = ""

    @property
    def label(self) -> str:
        return f"{self.recipe} · {self.artifact}" if self.artifact != "source" else f"{self.model} · source"


@dataclass(frozen=True)
class Comparison:
    """Points on common scales. If the jobs share no metric or no shape, that scale is left out, and `notes` contains the reason."""

    points: tuple[Point, ...]
    metric: str | None  #: name of the quality figure
    data: str | None
    better: str  #: "higher" or "lower"
    shape: tuple[int, int] | None  #: batch and length of the latency
    notes: tuple[str, ...] = ()


def compare(reports: Sequence[Report], metric: str | None = None) -> Comparison:
    """Compare the reports' artifacts, and each source once, on common scales, and mark the points that another point dominates.

    metric: the quality figure to compare by, perhaps of a slice as in `kl_divergence[code]`; None: the first figure that every artifact has.
    """
    artifacts = [(report, artifact) for report in reports for artifact in report.artifacts]
    key, better = _shared_metric([artifact for _, artifact in artifacts], metric)
    shape = _shared_shape([subject for report in reports for subject in (report.source, *report.artifacts)])
    points = [_point(report, artifact, key, shape) for report, artifact in artifacts]
    sources: dict[str, Point] = {}
    for report in reports:
        sources.setdefault(str(report.model.get("digest")), _point(report, report.source, key, shape))
    return Comparison(
        points=tuple(_mark([*sources.values(), *points], better)),
        metric=key[0] if key else None,
        data=key[1] if key else None,
        better=better,
        shape=shape,
        notes=tuple(_notes(reports, key, shape, metric)),
    )


def _shared_metric(subjects: Sequence[Subject], wanted: str | None) -> tuple[tuple[str, str] | None, str]:
    first = subjects[0] if subjects else None
    for measured in () if first is None else first.measurements if wanted is None else _figures(first):
        named = wanted is None or measured.name == wanted
        if named and not measured.of and all(_find(other, measured.name, measured.data) for other in subjects):
            return (measured.name, measured.data), measured.better
    return None, "higher"


def _figures(subject: Subject) -> Iterator[Measurement]:
    """The figures of all data, and then those of slices, which are named as in `kl_divergence[code]`."""
    yield from subject.measurements
    for part in subject.slices:
        for figure in part.measurements:
            yield figure.model_copy(update={"name": f"{figure.name}[{part.name}]"})


def _shared_shape(subjects: Sequence[Subject]) -> tuple[int, int] | None:
    shapes = [{(timing.batch, timing.length) for timing in subject.timings} for subject in subjects]
    return min(set.intersection(*shapes), default=None) if shapes else None


def _find(subject: Subject, name: str, data: str) -> Measurement | None:
    return next(
        (measured for measured in _figures(subject) if (measured.name, measured.data, measured.of) == (name, data, "")),
        None,
    )


def _point(report: Report, subject: Subject, key: tuple[str, str] | None, shape: tuple[int, int] | None) -> Point:
    measured = _find(subject, *key) if key else None
    itself = _OF_ITSELF.get(key[0].split("[")[0]) if key and subject is report.source else None
    timing = next(
        (shape_timing for shape_timing in subject.timings if (shape_timing.batch, shape_timing.length) == shape), None
    )
    return Point(
        job_id=report.job_id,
        model=str(report.model.get("name", "?")),
        recipe=str(report.recipe.get("name", "?")),
        artifact=subject.name,
        size_bytes=subject.size_bytes,
        latency_ms=timing.p50_ms if timing else None,
        quality=measured.value if measured else itself,
        quality_low=measured.low if measured else None,
        quality_high=measured.high if measured else None,
        verdict="" if subject is report.source else _verdict(report, subject),
    )


def _verdict(report: Report, subject: Subject) -> str:
    missed = any(gate.artifact == subject.name and not gate.passed for gate in report.gates)
    return report.verdict if missed or report.verdict == "accepted" else f"{report.verdict}; its own gates are passed"


def _mark(points: list[Point], better: str) -> list[Point]:
    def goods(point: Point) -> list[float | None]:
        quality = point.quality if point.quality is None or better == "lower" else -point.quality
        return [float(point.size_bytes), point.latency_ms, quality]

    def dominates(a: Point, b: Point) -> bool:
        pairs = list(zip(goods(a), goods(b), strict=True))
        # `a` cannot dominate if it lacks a value that `b` has. A value that `b` lacks is not compared.
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if len(known) < sum(y is not None for _, y in pairs):
            return False
        return all(x <= y for x, y in known) and any(x < y for x, y in known)

    found = []
    for point in points:
        # A point of unknown quality dominates nothing, however small and fast it is.
        rivals = [other for other in points if other is not point and other.quality is not None]
        by = next((other for other in rivals if dominates(other, point)), None)
        found.append(replace(point, dominated_by=by.label if by else ""))
    return found


def _notes(
    reports: Sequence[Report], key: tuple[str, str] | None, shape: tuple[int, int] | None, wanted: str | None
) -> list[str]:
    notes = []
    if wanted is not None and key is None:
        notes.append(f"Not every artifact has a {wanted} on the same data, so quality is left out.")
    elif key is None:
        notes.append("The artifacts share no quality figure on the same data, so quality is left out.")
    if shape is None:
        notes.append("The models were not timed at a common shape, so latency is left out.")
    if len({str(report.model.get("digest")) for report in reports}) > 1:
        notes.append("The jobs pressed different models: fidelity is each against its own source.")
    machines = {
        (report.environment.get("cpu"), report.environment.get("threads"), report.environment.get("device"))
        for report in reports
    }
    if len(machines) > 1:
        notes.append("The jobs ran on different machines or numbers of threads: their latencies don't compare.")
    return notes
