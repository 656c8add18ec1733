"""Find measured figures of a page that stand outside of the markers of docs/figures.py, and so don't come from bench/results."""

import re

from docs.figures import BLOCK

_FENCED = re.compile(r"^ *```.*?^ *```", re.M | re.S)
_CODE = re.compile(r"`[^`\n]*`")
_VALUE = re.compile(r"\d ?(?:µs|ms|s|MB|MiB|GB|GiB|[kMG]?B/s|\w+/s|points)\b|\d ?[%×](?! \d)")  # 4 × 4 is a shape
_TITLE = re.compile(r"\b(?:ms|seconds|MB|MiB|GB|GiB|\w+/s|perplexity|cosine|accuracy|faster)\b")
_RATE = re.compile(r"\d ?(?:µs|ms|[kMG]?B/s|(?:tokens|requests|claims|steps)/s)\b|\d×|\d times as fast")


def unmarked(page: str) -> list[str]:
    """Lines of tables that hold measured figures and stand outside of markers. A table of other figures has `<!-- not measured: why -->` above it."""
    found, table = [], []
    rest = _CODE.sub("``", _FENCED.sub("", BLOCK.sub("", page)))
    above = ""
    for line in [*rest.splitlines(), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table and not above.startswith("<!-- not measured: "):
            found += _measured_lines(table)
        above = line.strip() or ("" if table else above)
        table = []
    return found


def _measured_lines(table: list[str]) -> list[str]:
    head, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    titled = {at for at, cell in enumerate(head) if _TITLE.search(cell)}
    return [
        line
        for line, cells in zip(table[1:], body, strict=True)
        if any(_VALUE.search(cell) or (at in titled and cell[:1].isdigit()) for at, cell in enumerate(cells))
    ]


def unsourced_prose(page: str) -> list[str]:
    """Times and rates in prose outside of markers: they must come from the results, too."""
    rest = _CODE.sub("", _FENCED.sub("", BLOCK.sub("", page)))
    return [line for line in rest.splitlines() if not line.startswith("|") and _RATE.search(line)]
