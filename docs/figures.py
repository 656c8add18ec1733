"""Write measured figures into the pages, from bench/results. `python -m docs.figures`; a test keeps the pages in step.

In a page, a template stands in a comment, and what it comes to stands behind it, up to `<!-- end -->`:

    <!-- figures: submit storage
    | what | measured |
    |---|---|
    | submit over HTTP | {submit/ours/rate:.0f} requests/s |

    {@sources}
    -->

The first line names the results that the template uses. `{submit/ours/rate:.0f}` is the figure `ours/rate` of bench/results/submit.json, in
Python's format; without a format it is written as it was measured. `{/ours/rate}` means the first result. `@bar`, `@verdict`
and `@spread` behind a name give the figure's bar, PASS or MISS, and how far it varied, if it is known. A line with `{/*}` or `{/group/*}` is repeated
for each row, whose name takes the place of every `*`; `{/group/* by size}` sorts the rows. A row without one of the figures shows `–` there.
`{@sources}` says when and where all figures were taken.
"""

import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from bench.record import Figure, Run, read

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "how-to").glob("*.md")))
BLOCK = re.compile(
    r"^<!-- figures: (?P<names>[^\n]+)\n(?P<template>.*?)^-->\n(?P<shown>.*?)^<!-- end -->$", re.M | re.S
)
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
_FORMAT = re.compile(r":([+,]*(?:\.\d+)?[df%])$")
_ROWS = re.compile(r"^(.*/\*)(?: by (\w+))?$")
_SIGNS = {"<=": "≤", ">=": "≥", "<": "<", ">": ">"}


class UnknownFigureError(Exception):
    """A template asks for a figure that no result has."""


@dataclass
class Figures:
    """The results that a template names, and which of their runs it has used."""

    names: list[str]
    runs: dict[str, tuple[Run, ...]] = field(default_factory=dict)
    used: dict[str, list[Run]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            try:
                self.runs[name] = read(name)
            except FileNotFoundError:
                raise UnknownFigureError(f"There is no bench/results/{name}.json.") from None
            self.used[name] = []

    def find(self, reference: str) -> Figure:
        result, figure = self._split(reference)
        for run in self.runs[result]:
            for candidate in run.figures:
                if candidate.name == figure:
                    if run not in self.used[result]:
                        self.used[result].append(run)
                    return candidate
        raise UnknownFigureError(f"bench/results/{result}.json has no figure {figure!r}.")

    def rows(self, reference: str, by: str | None) -> list[str]:
        """What may stand for the `*` at the end of a reference: in the order of the file, or by the values of a column."""
        result, prefix = self._split(reference.removesuffix("*"))
        names = [
            candidate.name
            for run in self.runs[result]
            for candidate in run.figures
            if candidate.name.startswith(prefix)
        ]
        rows = dict.fromkeys(name.removeprefix(prefix).split("/")[0] for name in names if "/" in name[len(prefix) :])
        return sorted(rows, key=lambda row: self.find(f"{result}/{prefix}{row}/{by}").value) if by else list(rows)

    def _split(self, reference: str) -> tuple[str, str]:
        result, _, figure = reference.partition("/")
        result = result or self.names[0]
        if result not in self.runs:
            raise UnknownFigureError(f"The marker doesn't name the result {result!r}, which {{{reference}}} asks for.")
        return result, figure

    def sources(self) -> str:
        """A sentence; benches that ran in the same place on the same day are named together."""
        places: dict[str, list[str]] = {}
        for name, runs in self.used.items():
            for run in runs:
                places.setdefault(_place(run), []).append(f"`bench.{name}`")
        parts = [f"{', '.join(dict.fromkeys(benches))} on {place}" for place, benches in places.items()]
        return f"*Taken by {'; '.join(parts)}.*"


def _place(run: Run) -> str:
    day, machine = date.fromisoformat(run.date), run.machine
    features = f" ({', '.join(machine.features)})" if machine.features else ""
    parts = [f"{machine.processor}{features}" if machine.processor else "", machine.gpu or ""]
    parts.append(f"{machine.cores} cores" if machine.cores else "")
    parts.append(f"{machine.memory_gib} GiB" if machine.memory_gib else "")
    parts += [f"{library} {run.versions[library]}" for library in ("torch", "llmcompressor") if library in run.versions]
    note = f" ({run.note})" if run.note else ""
    return f"{day.day} {day:%B %Y}: {', '.join(part for part in parts if part)}{note}"


def written(page: str) -> str:
    """A page with what its templates come to. Raises UnknownFigureError."""
    return BLOCK.sub(_block, page)


def _block(found: re.Match[str]) -> str:
    figures = Figures(found["names"].split())
    lines = [line for part in found["template"].splitlines() for line in _lines(part, figures)]
    shown = "\n".join(lines).replace("{@sources}", figures.sources())
    return f"<!-- figures: {found['names']}\n{found['template']}-->\n{shown}\n<!-- end -->"


def _lines(line: str, figures: Figures) -> list[str]:
    """What a line of a template comes to: itself, or a line for each row."""
    labels = [name for name in _PLACEHOLDER.findall(line) if _ROWS.match(name)]
    if not labels:
        return [_PLACEHOLDER.sub(lambda found: _shown(found[1], figures), line)]
    reference, by = _ROWS.findall(labels[0])[0]
    rows = figures.rows(reference, by)
    plain, *rest = _PLACEHOLDER.split(line)
    columns = [_column(placeholder, rows, figures) for placeholder in rest[::2]]
    texts = rest[1::2]
    return [
        plain + "".join(cell + text for cell, text in zip(cells, texts, strict=True))
        for cells in zip(*columns, strict=True)
    ]


def _column(placeholder: str, rows: list[str], figures: Figures) -> list[str]:
    """What a placeholder is in each row. Raises UnknownFigureError where no row has the figure."""
    if _ROWS.match(placeholder):
        return rows
    cells, missing = [], []
    for row in rows:
        try:
            cells.append(_shown(placeholder.replace("*", row), figures))
        except UnknownFigureError as error:
            missing.append(error)
            cells.append("" if "@spread" in placeholder else "–")
    if missing and len(missing) == len(rows):
        raise missing[0]
    return cells


def _shown(placeholder: str, figures: Figures) -> str:
    if placeholder == "@sources":
        return "{@sources}"  # known when all lines are written
    name, attribute = _FORMAT.sub("", placeholder), ""
    given = _FORMAT.search(placeholder)
    if "@" in name:
        name, attribute = name.split("@")
    figure = figures.find(name)
    if attribute == "bar":
        if not figure.bar:
            raise UnknownFigureError(f"{name} has no bar.")
        sign, bound = figure.bar.split(" ")
        return f"{_SIGNS[sign]} {float(bound):g}"
    if attribute == "verdict":
        return figure.verdict
    how = given[1] if given else ""
    if attribute == "spread":
        return " ({} to {})".format(*(_format(value, how) for value in figure.spread)) if figure.spread else ""
    return _format(figure.value, how)


def _format(value: float, how: str) -> str:
    """In Python's format; without one, as it was measured."""
    return format(round(value) if how.endswith("d") else value, how)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        if (new := written(text)) != text:
            page.write_text(new)
