"""The report's part on slices: how far each part of a data set is from the source, the farthest first."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from nightpress.core.compress.report import charts
from nightpress.core.compress.report.costs import Table
from nightpress.core.compress.report.figures import change, figure, metric_name
from nightpress.core.handoff.report import Measurement, Report, Slice
from nightpress.core.handoff.slices import figure_of, figures_shown


class SlicesShown(NamedTuple):
    """An artifact's slices, as a report shows them."""

    artifact: str
    charts: tuple[Markup, ...]  #: bars, one chart for each figure that slices are put in order by
    table: Table


def slices(report: Report) -> list[SlicesShown]:
    return [
        SlicesShown(artifact.name, _charts(artifact.slices), _table(artifact.slices))
        for artifact in report.artifacts
        if artifact.slices
    ]


def _table(found: Sequence[Slice]) -> Table:
    names = figures_shown(found)
    titles = {figure.name: metric_name(figure) for part in found for figure in part.measurements if not figure.of}
    several = len({part.data for part in found}) > 1
    rows = tuple(
        (
            f"{part.name} · {part.data}" if several else part.name,
            f"{part.examples:,}",
            *(_cell(figure_of(part, name)) for name in names),
        )
        for part in found
    )
    return Table(("slice", "examples", *(titles[name] for name in names)), rows)


def _cell(found: Measurement | None) -> str:
    if found is None:
        return "–"
    changed = change(found)
    return f"{figure(found)} ({changed})" if changed else figure(found)


def _charts(found: Sequence[Slice]) -> tuple[Markup, ...]:
    ranked: dict[str, list[tuple[Slice, Measurement]]] = {}
    for part in found:
        if part.ranked is not None:
            ranked.setdefault(part.ranked.name, []).append((part, part.ranked))
    return tuple(Markup(_bars(pairs)) for pairs in ranked.values())  # noqa: S704 - escaped there


def _bars(pairs: Sequence[tuple[Slice, Measurement]]) -> str:
    """Bars of how far each slice is from the source, with a line to the unfavourable end of the interval."""
    first = pairs[0][1]
    top = max(max(_distance(figure), _worst(figure)) for _, figure in pairs) or 1.0
    caption = metric_name(first) + (": bars show what it lacks to 1" if first.better == "higher" else "")
    return charts.bars(
        [
            charts.Bar(
                part.name,
                f"{figure(measured)}, n = {part.examples:,}",
                _distance(measured) / top,
                "warm",
                _worst(measured) / top,
            )
            for part, measured in pairs
        ],
        f"{caption}; the thin line ends where the 95% interval does",
    )


def _distance(found: Measurement) -> float:
    return max(0.0, 1 - found.value if found.better == "higher" else found.value)


def _worst(found: Measurement) -> float:
    end = found.low if found.better == "higher" else found.high
    return 0.0 if end is None else max(0.0, 1 - end if found.better == "higher" else end)
