"""The tables of searches within a gate: what each pass tried, what it chose, and what was beyond."""

from typing import NamedTuple

from nightpress.core.compress.report.costs import Table
from nightpress.core.compress.report.figures import megabytes
from nightpress.core.handoff.report import PassRecord, Report, Tried, Within

_HEAD = ("tried", "weights", "figure, against the gate", "gate", "seconds")


class SearchShown(NamedTuple):
    """A pass's search, as a report shows it."""

    record: PassRecord
    gate: str
    table: Table
    notes: tuple[str, ...]


def searches(report: Report) -> list[SearchShown]:
    return [
        SearchShown(
            record, record.within.gate, Table(_HEAD, tuple(map(_row, record.within.tried))), _notes(record.within)
        )
        for record in report.passes
        if record.within is not None
    ]


def _row(tried: Tried) -> tuple[str, ...]:
    passed = "kept" if tried.passed else "missed by its interval" if tried.unsure else "missed"
    return tried.what, megabytes(tried.size_bytes), tried.explanation, passed, f"{tried.seconds:.1f}"


def _notes(found: Within) -> tuple[str, ...]:
    chosen = "It keeps the gate." if found.kept else "No result that was tried keeps the gate; this one came nearest."
    notes = [
        f"Chosen: {found.chosen}. {chosen}",
        f"Measured on {found.examples} examples of {', '.join(found.data)}: one half of the data chooses, and all figures of the artifacts come from the other. Of {found.candidates} possible results, {len(found.tried)} were tried.",
    ]
    if found.beyond is not None:
        notes.append(f"On the other side of the gate: {found.beyond.what}, {found.beyond.explanation}.")
    return (*notes, *([found.note] if found.note else []))
