"""report.json, and what is drawn from it alone: a Markdown model card, one self-contained HTML page, and the page that compares several.

Nothing here needs torch: the command line and the web page draw with it too.
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from nightpress.core.compress import charts, report_costs
from nightpress.core.handoff.compare import compare
from nightpress.core.handoff.report import (
    REPORT_FILE,
    GenerationTiming,
    LayerEffect,
    Measurement,
    PassRecord,
    Report,
    Series,
    Speedup,
    Subject,
    Timing,
    decode_speedup,
    speedup,
)
from nightpress.core.recipes.passes import catalog

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
LAYERS_SHOWN = 40

_Row = tuple[str, str, list[tuple[str, str]]]  #: what, the source's figure, [(an artifact's figure, its change)]
_NONE = ("–", "")
_UNKNOWN = "unknown"

_NAMES = {
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "masked_accuracy": "Hidden words guessed",
    "accuracy": "Accuracy",
    "f1": "F1, macro",
    "class_f1": "F1",
    "entity_f1": "Entity F1",
    "choice_accuracy": "Multiple choice",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "ndcg": "nDCG",
    "recall": "Recall",
    "generation_match": "Texts written alike",
    "prefix_match": "Tokens written alike",
    "cosine": "Cosine with the source",
    "centred_cosine": "Cosine with the source, centred",
    "top1_agreement": "Top-1 agreement with the source",
    "label_agreement": "Labels given alike",
    "rank_correlation": "Rank correlation with the source",
    "correlation": "Correlation with the source",
    "mean_error": "Mean error against the source",
    "largest_error": "Largest error against the source",
    "kl_divergence": "KL divergence from the source",
}
_SHARES = frozenset(
    {
        "accuracy",
        "choice_accuracy",
        "masked_accuracy",
        "top1_agreement",
        "label_agreement",
        "generation_match",
        "prefix_match",
        "recall",
    }
)
_FINE = frozenset(
    {"cosine", "centred_cosine", "kl_divergence", "rank_correlation", "correlation", "mean_error"}
)  #: five digits
#: what the Hub calls a figure, where it has its own name for it
_HUB_METRICS = {"spearman": "spearmanr", "pearson": "pearsonr", "entity_f1": "seqeval", "choice_accuracy": "acc_norm"}
_PIPELINE_TAGS = {
    "causal-lm": "text-generation",
    "classification": "text-classification",
    "token-classification": "token-classification",
    "masked-lm": "fill-mask",
    "embedding": "feature-extraction",
}


def draw(report: Report) -> dict[str, bytes]:
    """All three files by name."""
    return {
        REPORT_FILE: report.model_dump_json(indent=1).encode() + b"\n",
        MARKDOWN_FILE: render_markdown(report).encode(),
        HTML_FILE: render_html(report).encode(),
    }


def render_html(report: Report) -> str:
    """One page that needs nothing else: no script, no font, no image, no network."""
    return _templates().get_template("report.html").render(**_context(report))


def render_comparison(reports: Sequence[Report], metric: str | None = None) -> str:
    """One page about several jobs: their artifacts on common scales, and which of them another one dominates."""
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
    """A model card: YAML that hubs read, then the comparison."""
    model = report.model
    front: dict[str, Any] = {
        "license": model.get("license"),
        "license_name": model.get("license_name"),
        "license_link": model.get("license_link"),
        "language": model.get("language"),
        "base_model": model["name"],
        "base_model_relation": _relation(report),
        "datasets": model.get("datasets"),
        "pipeline_tag": _PIPELINE_TAGS.get(str(model.get("task"))),
        "tags": ["nightpress", *(one.format for one in report.artifacts)],
        "model-index": [{"name": f"{model['name']}-{report.recipe['name']}", "results": _index_results(report)}],
    }
    known = {key: value for key, value in front.items() if value}
    metadata = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000)
    return _templates().get_template("report.md").render(metadata=metadata, **_context(report))


def _relation(report: Report) -> str:
    """What the Hub calls the result beside its source. Without a pass that changes weights, a format such as GGUF rounds them."""
    known = [catalog.pass_type(one["pass"]) for one in report.recipe.get("passes", ())]
    relations = {"finetune" if one is None else one.relation for one in known} - {None}
    return "quantized" if not relations or "quantized" in relations else "finetune"


def _index_results(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": _PIPELINE_TAGS.get(str(report.model.get("task")), "other"), "name": subject.name},
            "dataset": {"name": one.data, "type": one.data},
            "metrics": [
                {"type": _HUB_METRICS.get(one.name, one.name), "name": metric_name(one), "value": round(one.value, 6)}
            ],
        }
        for subject in report.artifacts
        for one in subject.measurements
    ]


def metric_name(one: Measurement) -> str:
    """What a reader calls a figure, e.g. `nDCG@10` or `F1 of negative`."""
    rank = one.unit if one.unit.startswith("@") else ""
    return _NAMES.get(one.name, one.name.replace("_", " ")) + rank + (f" of {one.of}" if one.of else "")


def _context(report: Report) -> dict[str, Any]:
    subjects = [report.source, *report.artifacts]
    verifying, total = report.phases.get("verifying", 0.0), sum(report.phases.values())
    return {
        "report": report,
        "comparison": compare([report]) if len(report.artifacts) > 1 else None,
        "rows": _rows(report),
        "headline": _headline(report),
        "latency_charts": [Markup(one) for one in charts.timings(subjects)],  # noqa: S704 - escaped there
        "throughput_charts": [Markup(one) for one in charts.timings(subjects, throughput=True)],  # noqa: S704
        "pareto_chart": Markup(_pareto(report)),  # noqa: S704
        "phase_chart": Markup(charts.phases(report.phases)),  # noqa: S704
        "verifying_share": verifying / total if total else 0.0,
        "curve_charts": [
            (record, [Markup(one) for one in _curves(record)])  # noqa: S704 - escaped there
            for record in report.passes
            if record.series
        ],
        "profiles": report_costs.profiles(report),
        "generation_bars": [Markup(one) for one in report_costs.generation_bars(subjects)],  # noqa: S704
        "generation_plots": [(title, Markup(one)) for title, one in report_costs.generation_plots(subjects)],  # noqa: S704
        "caches": [found for record in report.passes if (found := report_costs.cache_tables(record))],
        "zeros": report_costs.storage_tables(report),
        "gates_said": _gates_said(report),
        "layer_charts": _layer_charts(report.passes),
        "layers_shown": LAYERS_SHOWN,
        "recipe_json": json.dumps(report.recipe, indent=2),
    }


def _curves(record: PassRecord) -> list[str]:
    """A plot for each scale: losses and accuracies have no axis in common, nor have steps and what else they may stand over."""
    scales: dict[tuple[str, bool], list[Series]] = {}
    for one in record.series:
        scales.setdefault((one.x_label, one.name.endswith("accuracy")), []).append(one)
    return [charts.curves(some, f"{record.name} by {x}") for (x, _), some in scales.items()]


def _pareto(report: Report) -> str:
    return charts.pareto(compare([report])) if len(report.artifacts) > 1 else ""


def _gates_said(report: Report) -> str:
    """In a line, why the verdict is what it is."""
    if not report.gates:
        return ""
    if not (missed := [one for one in report.gates if not one.passed]):
        return "The gate is passed." if len(report.gates) == 1 else f"All {len(report.gates)} gates are passed."
    artifacts: dict[str, list[str]] = {}
    for one in missed:
        artifacts.setdefault(one.gate.split()[0].replace("_", " "), []).append(one.artifact)
    said = "; ".join(f"{metric} by {' and '.join(names)}" for metric, names in artifacts.items())
    return f"{len(missed)} of {len(report.gates)} gates missed: {said}."


def _layer_charts(passes: Sequence[PassRecord]) -> list[tuple[PassRecord, list[str], Markup, Markup, int]]:
    """What each pass did to each layer, drawn once where several formats carry the same."""
    drawn: list[tuple[PassRecord, list[str], Markup, Markup, int]] = []
    for record in passes:
        formats = [str(record.summary["format"])] if "format" in record.summary else []
        same = next((one for one in drawn if (one[0].index, one[0].layers) == (record.index, record.layers)), None)
        if same is not None:
            same[1].extend(one for one in formats if one not in same[1])
        elif record.layers:
            layers = largest_errors(record.layers)
            sizes, errors = charts.layer_sizes(layers), charts.layer_errors(layers)
            drawn.append((record, formats, Markup(sizes), Markup(errors), len(record.layers)))  # noqa: S704 - escaped there
    return drawn


def largest_errors(layers: tuple[LayerEffect, ...], shown: int = LAYERS_SHOWN) -> tuple[LayerEffect, ...]:
    """All layers in the model's order, or of many those with the largest errors."""
    if len(layers) <= shown:
        return layers
    bound = sorted((one.relative_error for one in layers), reverse=True)[shown - 1]
    return tuple(one for one in layers if one.relative_error >= bound)[:shown]


def _headline(report: Report) -> list[tuple[str, str, str]]:
    """For each artifact: its name, how small and how fast it became in a line, and its quality in another."""
    lines = []
    for one in report.artifacts:
        parts = [f"{one.size_bytes / report.source.size_bytes:.0%} of the size"]
        lines_of_speed = (
            report_costs.speed_line("speed", "{} the speed", _speedups(one, report.source)),
            report_costs.speed_line("decoding", "decodes {} as fast", _decode_speedups(one, report.source)),
        )
        parts += [line for line in lines_of_speed if line]
        first = one.measurements[0] if one.measurements else None
        lines.append((one.name, ", ".join(parts), f"{metric_name(first)} {figure(first)}" if first else ""))
    return lines


def _speedups(artifact: Subject, source: Subject) -> list[Speedup]:
    base = {(one.batch, one.length): one for one in source.timings}
    return [speedup(one, base[shape]) for one in artifact.timings if (shape := (one.batch, one.length)) in base]


def _decode_speedups(artifact: Subject, source: Subject) -> list[Speedup]:
    base = {(one.batch, one.prompt, one.tokens): one for one in source.generation if one.cached}
    return [
        decode_speedup(one, base[shape])
        for one in artifact.generation
        if one.cached and (shape := (one.batch, one.prompt, one.tokens)) in base
    ]


def _rows(report: Report) -> list[_Row]:
    source, artifacts = report.source, report.artifacts
    rows: list[_Row] = [
        (
            "Size on disk",
            megabytes(source.size_bytes),
            [_of(one.size_bytes, source.size_bytes, megabytes) for one in artifacts],
        )
    ]
    every = {_key(one): one for subject in (source, *artifacts) for one in subject.measurements}
    for key, any_of_them in every.items():
        label = f"{metric_name(any_of_them)} · {any_of_them.data}"
        theirs = _find(source, key)
        cells = []
        for subject in artifacts:
            ours = _find(subject, key)
            cells.append((figure(ours), change(ours)) if ours else ("–", ""))
        rows.append((label, figure(theirs) if theirs else "–", cells))
    for at, timing in enumerate(source.timings):
        label = f"Latency, batch {timing.batch} × {timing.length} tokens"
        cells = [_of_time(one.timings[at], timing) for one in artifacts]
        rows.append((label, f"{timing.p50_ms:.1f} ms (p95 {timing.p95_ms:.1f})", cells))
        unit = timing.throughput_unit
        throughput = [
            (
                f"{one.timings[at].throughput:,.0f} {unit}",
                _times(one.timings[at].speedup, one.timings[at].throughput / timing.throughput),
            )
            for one in artifacts
        ]
        rows.append(
            (
                f"Throughput, batch {timing.batch} × {timing.length} tokens",
                f"{timing.throughput:,.0f} {unit}",
                throughput,
            )
        )
    rows += _generation_rows(source, artifacts)
    rows += _memory_row(
        "Peak memory of the process", source.peak_memory_bytes, [one.peak_memory_bytes for one in artifacts]
    )
    return rows


def _memory_row(label: str, theirs: int | None, ours: Sequence[int | None]) -> list[_Row]:
    """None: unknown. A report of an earlier version has 0 for that. The row is left out where nothing is known."""
    cells = [_of(one, theirs or 0, megabytes) if one else (_UNKNOWN, "") for one in ours]
    return [(label, megabytes(theirs) if theirs else _UNKNOWN, cells)] if theirs or any(ours) else []


def _generation_rows(source: Subject, artifacts: tuple[Subject, ...]) -> list[_Row]:
    rows: list[_Row] = []
    for at, base in enumerate(source.generation):
        shape = (
            f"batch {base.batch} × prompt of {base.prompt}, {base.tokens} written{'' if base.cached else ', no cache'}"
        )
        # A consumer that can't decode leaves its cells empty.
        ours = [one.generation[at] if one.generation else None for one in artifacts]
        rows.append(
            (
                f"Prefill, {shape}",
                _prefill(base),
                [
                    (_prefill(one), _times(one.prefill_speedup, one.prefill_tokens_per_s / base.prefill_tokens_per_s))
                    if one
                    else _NONE
                    for one in ours
                ],
            )
        )
        rows.append(
            (
                f"Decode, {shape}",
                _decode(base),
                [
                    (_decode(one), _times(one.decode_speedup, one.decode_tokens_per_s / base.decode_tokens_per_s))
                    if one
                    else _NONE
                    for one in ours
                ],
            )
        )
        peaks = [one.peak_memory_bytes if one else None for one in ours]
        rows += _memory_row(f"Peak memory, {shape}", base.peak_memory_bytes, peaks)
    return rows


def _prefill(one: GenerationTiming) -> str:
    return f"{one.prefill_tokens_per_s:,.0f} tokens/s (first token after {one.prefill_p50_ms:.1f} ms, p95 {one.prefill_p95_ms:.1f})"


def _decode(one: GenerationTiming) -> str:
    return (
        f"{one.decode_tokens_per_s:,.1f} tokens/s [{one.decode_slowest:,.1f} to {one.decode_fastest:,.1f}] "
        f"({one.token_p50_ms:.1f} ms a token, p95 {one.token_p95_ms:.1f})"
    )


def _key(one: Measurement) -> tuple[str, str, str]:
    return one.name, one.data, one.of


def _find(subject: Subject, key: tuple[str, str, str]) -> Measurement | None:
    return next((one for one in subject.measurements if _key(one) == key), None)


def _of(value: int, base: int, show: Any) -> tuple[str, str]:
    return show(value), f"{value / base:.0%}" if base else ""


def _of_time(ours: Timing, theirs: Timing) -> tuple[str, str]:
    shown, compared = f"{ours.p50_ms:.1f} ms (p95 {ours.p95_ms:.1f})", speedup(ours, theirs)
    if not compared.told_apart:
        return shown, "not told apart"
    faster = compared.value
    return shown, f"{faster:.2f}× faster" if faster >= 1 else f"{1 / faster:.2f}× slower"


def _times(speedup: Speedup | None, ratio: float) -> str:
    """ratio: of the medians, for a report of an earlier version."""
    if speedup is None:
        return f"{ratio:.2f}×"
    apart = "" if speedup.told_apart else ", not told apart"
    return f"{speedup.value:.2f}× [{speedup.low:.2f}, {speedup.high:.2f}]{apart}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def figure(one: Measurement) -> str:
    """Value and interval, with as many digits as tell them apart from each other and from 1."""
    known = one.low is not None and one.high is not None
    ends = f" [{shown(one.low, one.name)}, {shown(one.high, one.name)}]" if known else ""
    return shown(one.value, one.name) + ends


def shown(value: float | None, metric: str) -> str:
    """A figure of this metric."""
    if value is None:
        return "–"
    if metric in _SHARES:
        return f"{value:.1%}"
    return f"{value:.{5 if metric in _FINE else 3}f}"


def change(one: Measurement) -> str:
    """The change against the source, with its interval where it has one."""
    if one.change is None:
        return ""
    if one.change_low is None or one.change_high is None:
        return f"{one.change:+.2%}"
    return f"{one.change:+.2%} [{one.change_low:+.2%}, {one.change_high:+.2%}]"


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nightpress.core.compress", "templates"),
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
    """Someone's words in Markdown: no markup, no HTML and no line break of theirs survives."""
    one_line = " ".join(str(text).split())
    for special in "\\`*_[]<>#|":
        one_line = one_line.replace(
            special, f"\\{special}" if special not in "<>" else {"<": "&lt;", ">": "&gt;"}[special]
        )
    return one_line


def _table_cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _code_block(text: str) -> str:
    """Text for a fenced block, which it can't end."""
    return text.replace("```", "` ` `")
