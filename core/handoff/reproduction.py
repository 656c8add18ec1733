"""Compares the report of a second run of a recipe with the first report. Plain data, no I/O."""

from dataclasses import dataclass
from typing import Literal

from nightpress.core.handoff.report import Measurement, Report, Subject

Outcome = Literal["identical", "equivalent", "different"]


@dataclass(frozen=True)
class Bytes:
    artifact: str
    before: str | None
    after: str | None

    @property
    def same(self) -> bool:
        return self.before is not None and self.before == self.after


@dataclass(frozen=True)
class Figure:
    """A quality figure of both runs. Times are not compared, because they depend on the machine and not on the recipe."""

    subject: str
    name: str
    data: str
    before: float
    after: float | None  #: None: the second run did not measure the figure
    low: float | None
    high: float | None

    @property
    def same(self) -> bool:
        return self.after == self.before

    @property
    def within(self) -> bool:
        """Return whether the new value lies in the first report's interval; without an interval, whether it is equal to six digits."""
        if self.after is None:
            return False
        if self.low is None or self.high is None:
            return abs(self.after - self.before) <= 1e-6 * abs(self.before)
        return self.low <= self.after <= self.high


@dataclass(frozen=True)
class Reproduction:
    """The result of the comparison.

    `identical`: the same bytes and verdict, and every figure lies in its interval. `equivalent`: other bytes, but the same verdict and
    every figure in its interval. `different`: everything else.
    """

    outcome: Outcome
    bytes: tuple[Bytes, ...]
    figures: tuple[Figure, ...]
    versions: dict[str, tuple[str | None, str | None]]  #: package → (first run, second run), where they differ
    environment: dict[
        str, tuple[object, object]
    ]  #: processor, device and threads → (first run, second run), where they differ
    verdicts: tuple[str, str]


def judge(before: Report, after: Report) -> Reproduction:
    """Compare a report with the report of a second run."""
    again = {artifact.name: artifact for artifact in after.artifacts}
    digests = tuple(
        Bytes(artifact.name, artifact.digest, again[artifact.name].digest if artifact.name in again else None)
        for artifact in before.artifacts
    )
    subjects = {"source": after.source, **again}
    figures = []
    for subject in (before.source, *before.artifacts):
        theirs = _figures(subjects[subject.name]) if subject.name in subjects else []
        for measured in _figures(subject):
            match = next((other for other in theirs if _key(other) == _key(measured)), None)
            name = f"{measured.name} {measured.of}".strip()
            value = match.value if match else None
            figures.append(
                Figure(subject.name, name, measured.data, measured.value, value, measured.low, measured.high)
            )
    alike = all(figure.within for figure in figures) and before.verdict == after.verdict
    same = all(digest.same for digest in digests)
    then, now = _versions(before), _versions(after)
    return Reproduction(
        outcome="different" if not alike else "identical" if same else "equivalent",
        bytes=digests,
        figures=tuple(figures),
        versions={
            name: (then.get(name), now.get(name)) for name in sorted({*then, *now}) if then.get(name) != now.get(name)
        },
        environment={
            name: (before.environment.get(name), after.environment.get(name))
            for name in ("cpu", "device", "threads", "processes")
            if before.environment.get(name) != after.environment.get(name)
        },
        verdicts=(before.verdict, after.verdict),
    )


def _figures(subject: Subject) -> list[Measurement]:
    """All figures of a model. Those of slices name the slice; where they have no interval, nothing says how far they may move."""
    of_slices = (
        figure.model_copy(update={"of": f"{figure.of} slice {part.name}".strip()})
        for part in subject.slices
        for figure in part.measurements
        if figure.low is not None
    )
    return [*subject.measurements, *of_slices]


def _key(measured: Measurement) -> tuple[str, str, str]:
    return measured.name, measured.data, measured.of


def _versions(report: Report) -> dict[str, str]:
    named = report.environment.get("versions") or {}
    return {"nightpress": str(report.environment.get("nightpress")), **{k: str(v) for k, v in named.items()}}
