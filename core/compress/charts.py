"""Small bar charts as inline SVG. Colours come from the page's style sheet, so that they follow its light and dark."""

from collections.abc import Sequence
from html import escape

from core.handoff.report import LayerEffect, Subject

_WIDTH = 720
_LABEL = 300
_ROW = 20
_BAR = 12


def layer_sizes(layers: Sequence[LayerEffect]) -> str:
    """Bytes before (pale) and after of each layer."""
    top = max((one.bytes_before for one in layers), default=1) or 1
    rows = [
        (
            one.name,
            [(one.bytes_before / top, "pale"), (one.bytes_after / top, "solid")],
            f"{_bytes(one.bytes_before)} → {_bytes(one.bytes_after)}",
        )
        for one in layers
    ]
    return _bars(rows, "Bytes of each layer before and after")


def layer_errors(layers: Sequence[LayerEffect]) -> str:
    """Relative error of each layer."""
    top = max((one.relative_error for one in layers), default=1) or 1
    rows = [(one.name, [(one.relative_error / top, "warm")], f"{one.relative_error:.3%}") for one in layers]
    return _bars(rows, "Relative error of each layer")


def latency(subjects: Sequence[Subject]) -> str:
    """Median latency of each shape and model; a thin line reaches to the 95th percentile."""
    timings = [(subject, timing) for subject in subjects for timing in subject.timings]
    if not timings:
        return ""
    shapes = dict.fromkeys((timing.batch, timing.length) for _, timing in timings)
    parts, y = [], 0
    for batch, length in shapes:
        of_shape = [(s, t) for s, t in timings if (t.batch, t.length) == (batch, length)]
        # Each shape has its own scale: a batch of 32 would flatten all others.
        top = max(timing.p95_ms for _, timing in of_shape) or 1
        parts.append(f'<text class="head" x="0" y="{y + 15}">batch {batch} × {length} tokens</text>')
        y += 26
        for subject, timing in of_shape:
            kind = "pale" if subject.name == "source" else "solid"
            room = _WIDTH - _LABEL - 150 + 130
            bar, whisker = room * timing.p50_ms / top, room * timing.p95_ms / top
            start = 150
            middle = y + _BAR / 2
            parts.append(
                f'<text class="label" x="{start - 10}" y="{y + 10}" text-anchor="end">{escape(subject.name)}</text>'
                f'<rect class="{kind}" x="{start}" y="{y}" width="{max(bar, 1):.1f}" height="{_BAR}" rx="2"/>'
                f'<line class="whisker" x1="{start + bar:.1f}" x2="{start + whisker:.1f}" y1="{middle}" y2="{middle}"/>'
                f'<text class="value" x="{start + whisker + 8:.1f}" y="{y + 10}">{timing.p50_ms:.1f} ms</text>'
            )
            y += _ROW
        y += 10
    return _svg(y, "".join(parts), "Median latency by batch, length and model")


def _bars(rows: Sequence[tuple[str, list[tuple[float, str]], str]], title: str) -> str:
    parts = []
    room = _WIDTH - _LABEL - 130
    for at, (label, bars, value) in enumerate(rows):
        y = at * _ROW
        parts.append(
            f'<text class="label" x="{_LABEL - 10}" y="{y + 11}" text-anchor="end">{escape(_short(label))}'
            f"<title>{escape(label)}</title></text>"
        )
        for share, kind in bars:
            parts.append(
                f'<rect class="{kind}" x="{_LABEL}" y="{y + 1}" width="{max(room * share, 1):.1f}" height="{_BAR}" rx="2"/>'
            )
        longest = max((share for share, _ in bars), default=0)
        parts.append(f'<text class="value" x="{_LABEL + room * longest + 8:.1f}" y="{y + 11}">{escape(value)}</text>')
    return _svg(max(len(rows), 1) * _ROW, "".join(parts), title)


def _svg(height: float, body: str, title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'preserveAspectRatio="xMinYMin meet"><title>{escape(title)}</title>{body}</svg>'
    )


def _short(label: str, length: int = 44) -> str:
    """The end of a layer's name tells it apart."""
    return label if len(label) <= length else "…" + label[-(length - 1) :]


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
