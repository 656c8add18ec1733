"""The report's parts on a model's costs: its profile, the speed of text generation, and the effect of zeros on size and speed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nightpress.core.compress.report import charts
from nightpress.core.handoff.report import GenerationTiming, PassRecord, Report, Series, Speedup, Subject, same_device
from nightpress.core.recipes.profile import Profile, by_kind


def speed_line(what: str, said: str, speedups: Sequence[Speedup], base: str = "the source's") -> str:
    """One line on the speedups at all shapes: their range, and one interval that spans all of theirs. "" if nothing was timed.

    what: begins the line if no speedup is significant. said: a format for the range, e.g. `{} the speed`. base: what it is compared with.
    """
    if not speedups:
        return ""
    ends = f"[{min(speedup.low for speedup in speedups):.1f}×, {max(speedup.high for speedup in speedups):.1f}×]"
    apart = [speedup for speedup in speedups if speedup.told_apart]
    if not apart:
        return f"{what} not told apart from {base} {ends}"
    low, high = f"{min(speedup.value for speedup in speedups):.1f}", f"{max(speedup.value for speedup in speedups):.1f}"
    line = said.format(f"{low}×" + (f" to {high}×" if low != high else "")) + f" {ends}"
    blurred = len(speedups) - len(apart)
    return line + (f", not told apart from {base} at {blurred} of {len(speedups)} shapes" if blurred else "")


class Table(NamedTuple):
    """A table: the cells of its head and of its rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class ProfileShown(NamedTuple):
    kinds: Table
    shapes: Table
    chart: str  #: bars: operations by kind
    plot: str  #: lines: attention's quadratic share against the length
    notes: tuple[str, ...]


def profiles(report: Report) -> list[ProfileShown]:
    """Tables and charts for each `profile` of the recipe, which compare the source with the pressed model."""
    found = report.profiles
    return [_profile(before, after) for before, after in zip(found[::2], found[1::2], strict=False)]


def _profile(before: Profile, after: Profile) -> ProfileShown:
    first = before.shapes[0]
    theirs, ours = by_kind(before), by_kind(after)
    kinds = []
    for kind in theirs | ours:
        pair = [side.get(kind) for side in (theirs, ours)]
        cells = [
            _change(*[getattr(side, name) / 10**power if side else 0.0 for side in pair])
            for name, power in (("parameters", 6), ("bytes", 6), ("flops", 9))
        ]
        kinds.append((str(kind), *cells))
    columns: dict[str, list[str]] = {
        "batch × tokens": [f"{shape.batch} × {shape.length}" for shape in before.shapes],
        "GFLOP": _both(before, after, "flops", 1e9),
        "attention’s quadratic share": [
            f"{a.attention_share:.1%} → {b.attention_share:.1%}"
            for a, b in zip(before.shapes, after.shapes, strict=True)
        ],
        "FLOP/byte": _both(before, after, "intensity", 1),
        "at best, ms": _both(before, after, "bound_ms", 1),
        "held back by": [shape.limit or "" for shape in after.shapes],
        "key/value cache, MB": _both(before, after, "cache_bytes", 1e6),
        "next token at best, ms": _both(before, after, "decode_bound_ms", 1),
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    top = max((cost.flops for cost in (*theirs.values(), *ours.values())), default=1) or 1
    bars = [
        charts.Bar(
            kind,
            f"{theirs[kind].flops / 1e9:,.2f} → {ours[kind].flops / 1e9:,.2f} GFLOP",
            ours[kind].flops / top,
            behind=theirs[kind].flops / top,
        )
        for kind in theirs
        if kind in ours and theirs[kind].flops
    ]
    notes = []
    if after.quadratic_from is not None:
        notes.append(
            f"From {after.quadratic_from:,} tokens on, attention’s quadratic part is half of the pressed blocks’ work (source: {before.quadratic_from or 0:,})."
        )
    if after.device is not None:
        notes.append(
            f"At best on {after.device.name}: {after.device.flops_per_s / 1e9:,.0f} GFLOP/s and {after.device.bytes_per_s / 1e9:,.1f} GB/s."
        )
    return ProfileShown(
        kinds=Table(("kind", "M parameters", "MB", f"GFLOP at {first.batch} × {first.length}"), tuple(kinds)),
        shapes=Table(tuple(shown), tuple(zip(*shown.values(), strict=True))),
        chart=charts.bars(bars, f"Operations at {first.batch} × {first.length} tokens: source (pale) and pressed"),
        plot=_shares(before, after),
        notes=tuple(notes),
    )


def _shares(before: Profile, after: Profile) -> str:
    lines = []
    for subject in (before, after):
        points = {
            shape.length: shape.attention_share for shape in subject.shapes if shape.batch == subject.shapes[0].batch
        }
        x, y = zip(*sorted(points.items()), strict=True)
        lines.append(Series(name=subject.subject, x=x, y=y, x_label="tokens"))
    return charts.curves(lines, "Attention’s quadratic share of all operations") if len(lines[0].x) > 1 else ""


def _both(before: Profile, after: Profile, name: str, unit: float) -> list[str]:
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(before.shapes, after.shapes, strict=True)]
    return ["" if a is None or b is None else _change(a / unit, b / unit) for a, b in pairs]


def _change(before: float, after: float) -> str:
    share = f" ({after / before:.0%})" if before else ""
    return f"{before:,.2f} → {after:,.2f}{share}"


# Writing text ----------------------------------------------------------------------------------------------------------


def generation_bars(subjects: list[Subject]) -> list[str]:
    """Bar charts of decoded tokens/s, one for each batch and prompt length."""
    shapes = dict.fromkeys((timing.batch, timing.prompt) for subject in subjects for timing in subject.generation)
    tables = []
    for shape in shapes:
        found = [(s, timing) for s in subjects for timing in s.generation if (timing.batch, timing.prompt) == shape]
        top = max(timing.decode_tokens_per_s for _, timing in found) or 1
        bars = [
            charts.Bar(
                _label(subject, timing),
                f"{timing.decode_tokens_per_s:,.1f} tokens/s",
                timing.decode_tokens_per_s / top,
                "pale" if subject.name == "source" else "solid",
            )
            for subject, timing in found
        ]
        tables.append(charts.bars(bars, f"batch {shape[0]} × prompt of {shape[1]}"))
    return tables


def generation_plots(subjects: list[Subject]) -> list[tuple[str, str]]:
    """Plots (title, SVG) of tokens/s and memory against the prompt's length. Empty if the recipe names only one length."""
    found = []
    for title, value in (("Decoded tokens/s", _rate), ("Peak memory of the process, MB", _memory)):
        lines: dict[str, list[tuple[int, float]]] = {}
        for subject in subjects:
            least = min((timing.batch for timing in subject.generation), default=1)
            for timing in subject.generation:
                height = value(timing)
                if timing.batch == least and height is not None:
                    lines.setdefault(_label(subject, timing), []).append((timing.prompt, height))
        series = [
            Series(
                name=name, x=tuple(x for x, _ in points), y=tuple(y for _, y in points), x_label="tokens of the prompt"
            )
            for name, points in lines.items()
            if len(points) > 1
        ]
        if series:
            found.append((title, charts.curves(series, f"{title} against the prompt’s length")))
    return found


def _label(subject: Subject, timing: GenerationTiming) -> str:
    return subject.name if timing.cached else f"{subject.name}, no cache"


def _rate(timing: GenerationTiming) -> float:
    return timing.decode_tokens_per_s


def _memory(timing: GenerationTiming) -> float | None:
    return None if timing.peak_memory_bytes is None else timing.peak_memory_bytes / 1e6


# Caches and zeros ------------------------------------------------------------------------------------------------------


def cache_tables(record: PassRecord) -> tuple[Table, tuple[str, ...]] | None:
    """The results of a pass that chooses a cache: bytes at several lengths, and notes on the outputs with it. None for other passes."""
    weighed: list[dict[str, Any]] = record.summary.get("cache_bytes") or []
    if not weighed:
        return None
    rows = tuple(
        (
            f"{timing['tokens']:,}",
            f"{timing['dynamic_bytes'] / 1e6:,.2f} MB",
            f"{timing['bytes'] / 1e6:,.2f} MB ({timing['bytes'] / max(1, timing['dynamic_bytes']):.0%})",
        )
        for timing in weighed
    )
    notes = []
    for key, against in (("against_no_cache", "without a cache"), ("beyond", "with a dynamic cache")):
        if value := record.summary.get(key):
            notes.append(
                f"Behind prompts of {value['prompt']} tokens {value['tokens_alike']:.0%} of {value['tokens'] * value['texts']} tokens were those written {against}; "
                f"logits differ by {value['logit_difference']:.1e} of the largest at most."
            )
    if value := record.summary.get("prefix"):
        notes.append(
            f"Of a prompt of {value['prompt']} tokens {value['reused']} were known: it was read at {value['prefill_tokens_per_s_reused']:,.0f} tokens/s "
            f"instead of {value['prefill_tokens_per_s']:,.0f}, and the next token was {'the same' if value['same_token'] else 'another one'}."
        )
    return Table(("tokens", "dynamic", str(record.summary["mode"])), rows), tuple(notes)


def storage_tables(report: Report) -> list[tuple[PassRecord, Table, tuple[str, ...]]]:
    """For each pass that set weights to zero: their bytes in several formats, and notes on the speed."""
    found = []
    for record in report.passes:
        storage = record.summary.get("storage")
        if not storage:
            continue
        names = {
            "dense": "dense, as every format here stores them",
            "bitmap": "a bit a weight, and those that are left",
            "csr": "compressed sparse rows",
            "deflate": "dense, deflated (what zip or a compressed upload makes of them)",
            "deflate_before": "the source’s, deflated",
        }
        rows = tuple(
            (label, f"{storage[key] / 1e6:,.2f} MB", f"{storage[key] / max(1, storage['dense']):.0%}")
            for key, label in names.items()
        )
        found.append((record, Table(("pruned weights", "bytes", "of dense"), rows), tuple(_sparse_speed(report))))
    return found


def _sparse_speed(report: Report) -> list[str]:
    said = [
        f"{artifact.name} at batch {ours.batch} × {ours.length} tokens: {ours.p50_ms:.1f} ms; the source in transformers: {theirs.p50_ms:.1f} ms. "
        "Both run dense kernels: the difference is the runtime’s or noise, not the zeros’."
        for artifact in report.artifacts
        if same_device(artifact, report.source)
        for ours in artifact.timings
        for theirs in report.source.timings
        if (ours.batch, ours.length) == (theirs.batch, theirs.length)
    ]
    none = (
        "None of these formats keeps zeros apart, and none of their consumers skips them on a CPU. Patterns of 2:4 are multiplied as such by "
        "NVIDIA GPUs through torch’s semi-structured tensors alone, which a person makes after loading."
    )
    return [*said, none]
