"""The tables of `shape-to-speed`: what each model keeps and how fast it should be, and the times from which that follows."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from nightpress.core.compress.report.costs import Table
from nightpress.core.handoff.report import PassRecord, Report

_MODELS = ("model", "estimated", "milliseconds", "heads of each layer", "channels of each layer")
_TIMES = ("module of one layer", "kept", "milliseconds", "of the whole")


class ShapesShown(NamedTuple):
    """What a pass removed, as a report shows it."""

    record: PassRecord
    models: Table
    times: Table
    notes: tuple[str, ...]


def shapes(report: Report) -> list[ShapesShown]:
    return [
        ShapesShown(
            record, Table(_MODELS, tuple(_models(record.summary))), Table(_TIMES, tuple(_times(table))), _notes(table)
        )
        for record in report.passes
        if (table := record.summary.get("table")) and "stages" in record.summary
    ]


def _models(summary: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for stage in summary["stages"]:
        yield (
            f"{stage['speed']:g}×",
            f"{stage['estimated_speed']:.2f}×",
            f"{stage['estimated_ms']:.2f}",
            ", ".join(map(str, stage["heads"])),
            ", ".join(map(str, stage["channels"])),
        )


def _times(table: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, unit, column in (
        ("attention", "heads", table["heads_ms"]),
        ("feed-forward", "channels", table["channels_ms"]),
    ):
        whole = max(column.values()) or 1.0
        for count, ms in column.items():
            yield name, f"{count} {unit}", f"{ms:.3f}", f"{ms / whole:.0%}"


def _notes(table: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"Measured on: {table['conditions']}.",
        f"The source in float takes {table['source_ms']:.2f} ms, the whole model in the result's type {table['whole_ms']:.2f} ms, and embeddings, norms and head {table['rest_ms']:.2f} ms.",
    )
