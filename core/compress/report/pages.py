"""Renders report.json to a Markdown model card, to a self-contained HTML page, and to a page that compares several reports.

Needs no torch, because the command line and the web page use it too.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from nightpress.core.compress.report import charts, costs
from nightpress.core.compress.report.figures import megabytes, shown
from nightpress.core.compress.report.model_card import front_matter
from nightpress.core.compress.report.searches import searches
from nightpress.core.compress.report.serving import serving_tables
from nightpress.core.compress.report.shapes import shapes
from nightpress.core.compress.report.slices import slices
from nightpress.core.compress.report.table import headline, rows_of
from nightpress.core.handoff.compare import compare
from nightpress.core.handoff.report import (
    REPORT_FILE,
    LayerEffect,
    PassRecord,
    Report,
    Series,
)

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
LAYERS_SHOWN = 40
_FIGURE = re.compile(r"\s*[<>]")  #: what ends the figure in a gate's text


def draw(report: Report) -> dict[str, bytes]:
    """The report's files, JSON, Markdown and HTML: name → content."""
    return {
        REPORT_FILE: report.model_dump_json(indent=1).encode() + b"\n",
        MARKDOWN_FILE: render_markdown(report).encode(),
        HTML_FILE: render_html(report).encode(),
    }


def render_html(report: Report) -> str:
    """One self-contained page: no script, no font, no image, no network."""
    return _templates().get_template("report.html").render(**_context(report))


def render_comparison(reports: Sequence[Report], metric: str | None = None) -> str:
    """One page about several jobs: their artifacts on common scales, with a mark on those that another artifact dominates."""
    found = compare(reports, metric)
    return (
        _templates()
        .get_template("compare.html")
        .render(
            comparison=found,
            reports=reports,
            chart=Markup(charts.pareto(found)),  # noqa: S704 - escaped there
        )
    )


def render_markdown(report: Report) -> str:
    """A model card: YAML for model hubs, then the comparison."""
    return _templates().get_template("report.md").render(metadata=front_matter(report), **_context(report))


def _context(report: Report) -> dict[str, Any]:
    subjects = [report.source, *report.artifacts]
    verifying, total = report.phases.get("verifying", 0.0), sum(report.phases.values())
    return {
        "report": report,
        "comparison": compare([report]) if len(report.artifacts) > 1 else None,
        "rows": rows_of(report),
        "headline": headline(report),
        "slices": slices(report),
        "latency_charts": [Markup(timing) for timing in charts.timings(subjects)],  # noqa: S704 - escaped there
        "throughput_charts": [Markup(timing) for timing in charts.timings(subjects, throughput=True)],  # noqa: S704
        "pareto_chart": Markup(_pareto(report)),  # noqa: S704
        "phase_chart": Markup(charts.phases(report.phases)),  # noqa: S704
        "verifying_share": verifying / total if total else 0.0,
        "curve_charts": [
            (record, [Markup(curve) for curve in _curves(record)])  # noqa: S704 - escaped there
            for record in report.passes
            if record.series
        ],
        "profiles": costs.profiles(report),
        "serving_tables": serving_tables(report),
        "generation_bars": [Markup(bar) for bar in costs.generation_bars(subjects)],  # noqa: S704
        "generation_plots": [
            (title, Markup(plot))  # noqa: S704 - escaped there
            for title, plot in costs.generation_plots(subjects)
        ],
        "caches": [found for record in report.passes if (found := costs.cache_tables(record))],
        "searches": searches(report),
        "shapes": shapes(report),
        "zeros": costs.storage_tables(report),
        "gates_summary": _gates_summary(report),
        "layer_charts": _layer_charts(report.passes),
        "layers_shown": LAYERS_SHOWN,
        "recipe_json": json.dumps(report.recipe, indent=2),
    }


def _curves(record: PassRecord) -> list[str]:
    """One plot for each pair of axes: losses and accuracies need different y axes, and curves may have other x axes than steps."""
    scales: dict[tuple[str, bool], list[Series]] = {}
    for curve in record.series:
        scales.setdefault((curve.x_label, curve.name.endswith("accuracy")), []).append(curve)
    return [charts.curves(some, f"{record.name} by {x}") for (x, _), some in scales.items()]


def _pareto(report: Report) -> str:
    return charts.pareto(compare([report])) if len(report.artifacts) > 1 else ""


def _gates_summary(report: Report) -> str:
    """One line that explains the verdict."""
    if not report.gates:
        return ""
    if not (missed := [gate for gate in report.gates if not gate.passed]):
        return "The gate is passed." if len(report.gates) == 1 else f"All {len(report.gates)} gates are passed."
    artifacts: dict[str, list[str]] = {}
    for result in missed:
        artifacts.setdefault(_FIGURE.split(result.gate)[0].replace("_", " "), []).append(result.artifact)
    said = "; ".join(f"{metric} by {' and '.join(names)}" for metric, names in artifacts.items())
    return f"{len(missed)} of {len(report.gates)} gates missed: {said}."


def _layer_charts(passes: Sequence[PassRecord]) -> list[tuple[PassRecord, list[str], Markup, Markup, int]]:
    """For each pass, charts of its effect on each layer: (record, formats, sizes, errors, number of layers).

    If several formats have the same effects, they are drawn once.
    """
    drawn: list[tuple[PassRecord, list[str], Markup, Markup, int]] = []
    for record in passes:
        formats = [str(record.summary["format"])] if "format" in record.summary else []
        same = next(
            (earlier for earlier in drawn if (earlier[0].index, earlier[0].layers) == (record.index, record.layers)),
            None,
        )
        if same is not None:
            same[1].extend(name for name in formats if name not in same[1])
        elif record.layers:
            layers = largest_errors(record.layers)
            sizes, errors = charts.layer_sizes(layers), charts.layer_errors(layers)
            drawn.append((record, formats, Markup(sizes), Markup(errors), len(record.layers)))  # noqa: S704 - escaped there
    return drawn


def largest_errors(layers: tuple[LayerEffect, ...], shown: int = LAYERS_SHOWN) -> tuple[LayerEffect, ...]:
    """At most `shown` layers in the model's order: all of them, or those with the largest errors."""
    if len(layers) <= shown:
        return layers
    bound = sorted((layer.relative_error for layer in layers), reverse=True)[shown - 1]
    return tuple(layer for layer in layers if layer.relative_error >= bound)[:shown]


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nightpress.core.compress.report"),
        autoescape=jinja2.select_autoescape(["html"]),  # Markdown is escaped by the filters `plain` and `cell`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "megabytes": megabytes,
        "shown": shown,
        "cell": _table_cell,
        "plain": _plain_text,
        "code": _code_block,
    }
    return environment


def _plain_text(text: object) -> str:
    """Escape untrusted text for Markdown: markup, HTML and line breaks have no effect."""
    one_line = " ".join(str(text).split())
    for special in "\\`*_[]<>#|":
        one_line = one_line.replace(
            special, f"\\{special}" if special not in "<>" else {"<": "&lt;", ">": "&gt;"}[special]
        )
    return one_line


def _table_cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("`", "\\`").replace("<", "&lt;")


def _code_block(text: str) -> str:
    """Escape text for a fenced code block: it can't end the block."""
    return text.replace("```", "` ` `")
