"""The tables of searches within a gate: what each pass tried, what it chose, and what was beyond."""

from typing import NamedTuple

from nightpress.core.compress.report.costs import Table
from nightpress.core.compress.report.figures import megabytes
from nightpress.core.handoff.report import PassRecord, Report, Tried

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
            record, record.within.gate, Table(_HEAD, tuple(map(_row, record.within.tried))), record.within.told()
        )
        for record in report.passes
        if record.within is not None
    ]


def _row(tried: Tried) -> tuple[str, ...]:
    passed = "kept" if tried.passed else "missed by its interval" if tried.unsure else "missed"
    return tried.what, megabytes(tried.size_bytes), tried.explanation, passed, f"{tried.seconds:.1f}"
