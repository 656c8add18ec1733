"""The report's charts: bars as tables, which wrap on a phone and which screen readers can read; curves and scatter plots as inline SVG.

Colours come from the page's style sheet, which has light, dark and print variants. Charts have no scripts, fonts or images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from nightpress.core.handoff.compare import Comparison, Point
from nightpress.core.handoff.report import LayerEffect, Series, Subject

_LINE = 16  #: line height of the labels in a plot, in pixels
_PALETTE = 6  #: line colours in the style sheet


@dataclass(frozen=True)
class Bar:
    """One bar of a chart. Lengths are shares of the widest bar, 0…1."""

    label: str
    value: str
    share: float
    kind: str = "solid"  #: `solid`, `pale` or `warm`
    reach: float = 0.0  #: the end of a thin line, e.g. the 95th percentile
    behind: float = 0.0  #: a pale bar behind this one, e.g. the size before


def bars(rows: Sequence[Bar], caption: str) -> str:
    """A table of bars."""
    lines = []
    widest = max((len(_short(row.label)) for row in rows), default=0)
    for row in rows:
        behind = f'<i class="pale" style="width:{_percent(row.behind)}"></i>' if row.behind else ""
        reach = f'<i class="reach" style="width:{_percent(row.reach)}"></i>' if row.reach else ""
        lines.append(
            f'<tr><th scope="row" title="{escape(row.label)}">{escape(_short(row.label))}</th>'
            f'<td class="track" aria-hidden="true">{behind}{reach}<i class="{row.kind}" style="width:{_percent(row.share)}"></i></td>'
            f"<td>{escape(row.value)}</td></tr>"
        )
    return f'<table class="bars" style="--label:{widest}ch"><caption>{escape(caption)}</caption><tbody>{"".join(lines)}</tbody></table>'


def layer_sizes(layers: Sequence[LayerEffect]) -> str:
    """A chart of each layer's bytes before (pale) and after."""
    top = max((max(layer.bytes_before, layer.bytes_after) for layer in layers), default=1) or 1
    return bars(
        [
            Bar(
                layer.name,
                f"{_bytes(layer.bytes_before)} → {_bytes(layer.bytes_after)}",
                layer.bytes_after / top,
                behind=layer.bytes_before / top,
            )
            for layer in layers
        ],
        "Bytes of each layer: before (pale) and after",
    )


def layer_errors(layers: Sequence[LayerEffect]) -> str:
    """A chart of each layer's relative error."""
    top = max((layer.relative_error for layer in layers), default=1) or 1
    return bars(
        [Bar(layer.name, f"{layer.relative_error:.3%}", layer.relative_error / top, "warm") for layer in layers],
        "Relative error of each layer’s weights, ‖w − ŵ‖ / ‖w‖",
    )


def timings(subjects: Sequence[Subject], *, throughput: bool = False) -> list[str]:
    """A table of bars for each shape: latency with a line to the 95th percentile, or throughput."""
    shapes = dict.fromkeys((timing.batch, timing.length) for subject in subjects for timing in subject.timings)
    tables = []
    for batch, length in shapes:
        found = [(s, t) for s in subjects for t in s.timings if (t.batch, t.length) == (batch, length)]
        # Each shape has its own scale: a batch of 32 would flatten all others.
        top = max(t.throughput if throughput else t.p95_ms for _, t in found) or 1
        tables.append(
            bars(
                [
                    Bar(
                        subject.name,
                        f"{t.throughput:,.0f} {t.throughput_unit}"
                        if throughput
                        else f"{t.p50_ms:.1f} ms (p95 {t.p95_ms:.1f})",
                        (t.throughput if throughput else t.p50_ms) / top,
                        "pale" if subject.name == "source" else "solid",
                        0.0 if throughput else t.p95_ms / top,
                    )
                    for subject, t in found
                ],
                f"batch {batch} × {length} tokens",
            )
        )
    return tables


def phases(seconds: dict[str, float]) -> str:
    """A chart of the seconds of each phase of a job."""
    total = sum(seconds.values()) or 1
    top = max(seconds.values(), default=1) or 1
    return bars(
        [Bar(name, f"{spent:.1f} s · {spent / total:.0%}", spent / top) for name, spent in seconds.items()],
        "Seconds of each phase, and its share of the job",
    )


# Plots ---------------------------------------------------------------------------------------------------------------


def curves(series: Sequence[Series], title: str) -> str:
    """A plot of lines on a common scale. Equal lines are drawn once, with all their names. "" without any finite point."""
    named: dict[tuple[tuple[float, ...], tuple[float, ...]], list[str]] = {}
    for curve in series:
        named.setdefault((curve.x, curve.y), []).append(curve.name)
    label = series[0].x_label if series else ""
    series = [Series(name=" and ".join(names), x=x, y=y, x_label=label) for (x, y), names in named.items()]
    points = [
        (x, y)
        for curve in series
        for x, y in zip(curve.x, curve.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return ""

    def draw(width: int, height: int) -> str:
        frame = _Axes.around(points, width, height)
        parts = [frame.axes(label, "")]
        for at, curve in enumerate(series):
            line = " ".join(
                f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)
            )
            parts.append(f'<polyline class="line c{at % _PALETTE}" points="{line}"/>')
        return "".join(parts)

    names = "".join(
        f'<li><i class="c{at % _PALETTE}"></i>{escape(curve.name)}: {curve.y[0]:.4g} → {curve.y[-1]:.4g}</li>'
        for at, curve in enumerate(series)
        if curve.y
    )
    return _plot(draw, title) + f'<ul class="key">{names}</ul>'


def pareto(comparison: Comparison) -> str:
    """A plot of size against quality, or against latency if any point has no quality. Larger dots are faster; dominated points are grey.

    "" for fewer than two points.
    """
    by_quality = comparison.metric is not None and all(point.quality is not None for point in comparison.points)
    timed = comparison.shape is not None

    def height_of(point: Point) -> float | None:
        return point.quality if by_quality else point.latency_ms

    shown = [(point, value) for point in comparison.points if (value := height_of(point)) is not None]
    if len(shown) < 2 or not (by_quality or timed):
        return ""
    axis = (comparison.metric or "").replace("_", " ") if by_quality else "median latency, ms"
    fastest = min((subject.latency_ms for subject, _ in shown if subject.latency_ms), default=1.0)

    def draw(width: int, height: int) -> str:
        ends = [end for subject, value in shown for end in (value, *_interval(subject, by_quality))]
        frame = _Axes.around(
            [(0.0, ends[0])] + [(subject.size_bytes / 1e6, y) for subject, _ in shown for y in ends], width, height
        )
        parts = [frame.axes("size, MB", axis)]
        front = _front(shown, by_quality and comparison.better == "higher")
        parts.append(
            f'<polyline class="front" points="{" ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in front)}"/>'
        )
        spots: list[_Spot] = []
        # Dominated points are drawn first, so that they hide no other point.
        for at, (subject, value) in sorted(enumerate(shown, 1), key=lambda numbered: not numbered[1][0].dominated_by):
            x, y = frame.x(subject.size_bytes / 1e6), frame.y(value)
            kind = "grey" if subject.dominated_by else "pale" if subject.artifact == "source" else "solid"
            radius = 5 + 5 * fastest / subject.latency_ms if timed and subject.latency_ms else 7
            if low_high := _interval(subject, by_quality):
                parts.append(
                    f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.y(low_high[0]):.1f}" y2="{frame.y(low_high[1]):.1f}"/>'
                )
            parts.append(
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{escape(subject.label)}</title></circle>'
            )
            spots.append(_Spot(x + radius + 3, y + 4, [at]))
        parts += [
            f'<text x="{spot.x:.1f}" y="{spot.y:.1f}">{", ".join(map(str, sorted(spot.numbers)))}</text>'
            for spot in _together(spots)
        ]
        return "".join(parts)

    return _plot(draw, f"Size against {axis}")


@dataclass
class _Spot:
    """A label: where it begins, and the numbers of the points that it names."""

    x: float
    y: float
    numbers: list[int]


def _together(spots: Sequence[_Spot]) -> list[_Spot]:
    """Merge the labels that would overlap."""
    found: list[_Spot] = []
    for spot in sorted(spots, key=lambda spot: (spot.y, spot.x)):
        near = next(
            (earlier for earlier in found if abs(earlier.y - spot.y) < _LINE and abs(earlier.x - spot.x) < 2 * _LINE),
            None,
        )
        if near is None:
            found.append(_Spot(spot.x, spot.y, list(spot.numbers)))
        else:
            near.x, near.y = max(near.x, spot.x), (near.y + spot.y) / 2
            near.numbers += spot.numbers
    return found


def _front(shown: Sequence[tuple[Point, float]], higher: bool) -> list[tuple[float, float]]:
    """The Pareto front of the plot, as points (MB, height): in order of size, each better than all smaller ones."""
    front: list[tuple[float, float]] = []
    for size, value in sorted(
        ((subject.size_bytes / 1e6, value) for subject, value in shown),
        key=lambda at: (at[0], -at[1] if higher else at[1]),
    ):
        if not front or (value > front[-1][1] if higher else value < front[-1][1]):
            front.append((size, value))
    return front


def _interval(point: Point, by_quality: bool) -> tuple[float, float] | tuple[()]:
    if not by_quality or point.quality_low is None or point.quality_high is None:
        return ()
    return point.quality_low, point.quality_high


@dataclass(frozen=True)
class _Axes:
    """Maps numbers to pixels in a plot."""

    x0: float
    x1: float
    y0: float
    y1: float
    width: int
    height: int

    _LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 26, 40

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]], width: int, height: int) -> "_Axes":
        xs, ys = [x for x, _ in points], [y for _, y in points]
        room = (max(ys) - min(ys)) * 0.08 or abs(max(ys)) * 0.05 or 1.0
        return cls(min(xs), max(xs) * 1.05 or 1.0, min(ys) - room, max(ys) + room, width, height)

    def x(self, value: float) -> float:
        return self._LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (self.width - self._LEFT - self._RIGHT)

    def y(self, value: float) -> float:
        room = self.height - self._TOP - self._BOTTOM
        return self._TOP + room * (1 - (value - self.y0) / ((self.y1 - self.y0) or 1))

    def axes(self, x_label: str, y_label: str) -> str:
        parts = []
        for value, text in _ticks(self.y0, self.y1):
            at = self.y(value)
            parts.append(
                f'<line class="grid" x1="{self._LEFT}" x2="{self.width - self._RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text class="tick" x="{self._LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
            )
        bottom = self.height - self._BOTTOM
        for value, text in _ticks(self.x0, self.x1, most=max(3, self.width // 110)):
            at = self.x(value)
            parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
        parts.append(
            f'<line class="axis" x1="{self._LEFT}" x2="{self.width - self._RIGHT}" y1="{bottom}" y2="{bottom}"/>'
            f'<text class="tick" x="{self.width - self._RIGHT}" y="{self.height - 6}" text-anchor="end">{escape(x_label)}</text>'
            f'<text class="tick" x="4" y="14">{escape(y_label)}</text>'
        )
        return "".join(parts)


def _ticks(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """Round numbers between low and high, at most about `most`, with their texts. The texts have as many decimals as the step needs."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [(low, f"{low:.4g}")]
    rough = span / most
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
    first = math.ceil(low / step)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(at * step, f"{at * step:,.{digits}f}") for at in range(first, math.floor(high / step) + 1)]


def _plot(draw: Callable[[int, int], str], title: str) -> str:
    """Draw the plot twice, for a wide page and for a phone, so that letters keep their size. The style sheet shows one of them."""
    drawn = []
    for kind, width, height in (("wide-only", 860, 380), ("narrow-only", 360, 300)):
        drawn.append(
            f'<svg class="plot {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
            f"{draw(width, height)}</svg>"
        )
    return "".join(drawn)


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _short(label: str, length: int = 48) -> str:
    """Shorten a label at its start: layers' names differ at the end."""
    return label if len(label) <= length else "…" + label[-(length - 1) :]


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
