"""Write measured figures into the pages, from bench/results. `python -m docs.figures`; a test keeps the pages in step.

In a page, a template stands in a comment, and what it comes to stands behind it, up to `<!-- end -->`:

    <!-- figures: submit storage
    | what | measured |
    |---|---|
    | submit over HTTP | {submit/ours/rate:.0f} requests/s |

    {@sources}
    -->

The first line names the results that the template uses. `{submit/ours/rate:.0f}` is the figure `ours/rate` of bench/results/submit.json, in
Python's format; without a format it is written as it was measured. `{/ours/rate}` means the first result. `@bar`, `@verdict`, `@low` and
`@high` behind a name give the figure's bar, PASS or MISS, and its spread. A line with `{/*}` or `{/group/*}` is repeated for each row, whose
name takes the place of every `*`; a row without one of the figures shows `–` there. `{@sources}` says when and where all of them were taken.
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
            for one in run.figures:
                if one.name == figure:
                    if run not in self.used[result]:
                        self.used[result].append(run)
                    return one
        raise UnknownFigureError(f"bench/results/{result}.json has no figure {figure!r}.")

    def rows(self, reference: str) -> list[str]:
        """What may stand for the `*` at the end of a reference, in the order in which it was measured."""
        result, prefix = self._split(reference.removesuffix("*"))
        names = [one.name for run in self.runs[result] for one in run.figures if one.name.startswith(prefix)]
        found = [name.removeprefix(prefix).split("/")[0] for name in names if "/" in name.removeprefix(prefix)]
        return list(dict.fromkeys(found))

    def _split(self, reference: str) -> tuple[str, str]:
        result, _, figure = reference.partition("/")
        result = result or self.names[0]
        if result not in self.runs:
            raise UnknownFigureError(f"The marker doesn't name the result {result!r}, which {{{reference}}} asks for.")
        return result, figure

    def sources(self) -> str:
        parts = [_source(name, run) for name, runs in self.used.items() for run in runs]
        return f"*Taken by {'; '.join(parts)}.*"


def _source(name: str, run: Run) -> str:
    day = date.fromisoformat(run.date)
    machine = run.machine
    features = f" ({', '.join(machine.features)})" if machine.features else ""
    parts = [f"{machine.processor}{features}" if machine.processor else "", machine.gpu or ""]
    parts.append(f"{machine.cores} cores" if machine.cores else "")
    parts.append(f"{machine.memory_gb} GiB" if machine.memory_gb else "")
    parts += [
        f"{library} {number}" for library, number in run.versions.items() if library in {"torch", "llmcompressor"}
    ]
    note = f" ({run.note})" if run.note else ""
    return f"`bench.{name.split('-')[0]}` on {day.day} {day:%B %Y}: {', '.join(one for one in parts if one)}{note}"


def written(page: str) -> str:
    """A page with what its templates come to. Raises UnknownFigureError."""
    return BLOCK.sub(_block, page)


def _block(found: re.Match[str]) -> str:
    figures = Figures(found["names"].split())
    lines = [line for one in found["template"].splitlines() for line in _lines(one, figures)]
    shown = "\n".join(lines).replace("{@sources}", figures.sources())
    return f"<!-- figures: {found['names']}\n{found['template']}-->\n{shown}\n<!-- end -->"


def _lines(line: str, figures: Figures) -> list[str]:
    """What a line of a template comes to: itself, or a line for each row."""
    label = next((one for one in _PLACEHOLDER.findall(line) if one.endswith("/*")), None)
    if label is None:
        return [_PLACEHOLDER.sub(lambda one: _shown(one[1], figures), line)]
    lines = []
    for row in figures.rows(label):
        filled = line.replace(f"{{{label}}}", row)
        filled = _PLACEHOLDER.sub(lambda one, row=row: _of_row(one[1].replace("*", row), figures), filled)
        lines.append(filled)
    return lines


def _of_row(placeholder: str, figures: Figures) -> str:
    try:
        return _shown(placeholder, figures)
    except UnknownFigureError:
        return "–"


def _shown(placeholder: str, figures: Figures) -> str:
    if placeholder == "@sources":
        return "{@sources}"  # known when all lines are written
    name, attribute = _FORMAT.sub("", placeholder), ""
    given = _FORMAT.search(placeholder)
    if "@" in name:
        name, attribute = name.split("@")
    figure = figures.find(name)
    if attribute == "bar":
        sign, bound = figure.bar.split(" ")
        return f"{_SIGNS[sign]} {float(bound):g}"
    if attribute == "verdict":
        return figure.verdict
    value = figure.value
    if attribute in {"low", "high"}:
        if figure.spread is None:
            raise UnknownFigureError(f"{name} has no spread.")
        value = figure.spread[attribute == "high"]
    if given is None:
        return str(value)
    return format(round(value) if given[1].endswith("d") else value, given[1])


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        if (new := written(text)) != text:
            page.write_text(new)
