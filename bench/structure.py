"""Figures of the code's structure: arrows that run up, circles of files, and repeated code.

    python -m bench.structure [FOLDER]

FOLDER is a checkout, e.g. of an earlier commit. The default is this checkout.

* An *arrow* goes from a package to a sibling package that it imports. Floors are an order of packages in which every arrow runs down.
  The figure is the smallest number of arrows that run up, over all orders: 0 means that floors exist.
* A *circle* is a set of files in which each file imports every other file, directly or through others. Imports within functions count.
* Two places *repeat* each other if six consecutive lines of both are equal. Blank lines and comments are removed before, and
  indentation, `async` and `await` are ignored. So two equal runs of eight lines count three times. Tests are left out.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from bench.processes import run_python
from bench.record import Figure, finish, make_parser

FOLDERS = ("api", "client", "core", "migrations", "worker")
REPEATED_LINES = 6
_ASYNC = re.compile(r"\b(async|await) |Async|async_")
_GRAPH = """
import json, sys, grimp
graph = grimp.build_graph(*sys.argv[1:], cache_dir=None)
json.dump({name: sorted(graph.find_modules_directly_imported_by(name)) for name in sorted(graph.modules)}, sys.stdout)
"""

Graph = Mapping[str, Set[str]]  #: node → the nodes that it points to


@dataclass(frozen=True)
class Repeat:
    """Two equal runs of lines."""

    first: str  #: `path:line`
    second: str
    lines: int


@dataclass(frozen=True)
class Structure:
    """The measured structure of a checkout."""

    arrows_up: dict[str, int]  #: package → number of arrows that run up among the packages within it; without zeros
    circles: list[list[str]]
    repeats: list[Repeat]

    @property
    def repeated(self) -> int:
        """The number of pairs of places with six equal lines."""
        return sum(repeat.lines - REPEATED_LINES + 1 for repeat in self.repeats)


def structure(root: Path) -> Structure:
    """Measure a checkout."""
    files = import_graph(root)
    packages = {name.rpartition(".")[0] for name in files} - {""}
    up = {package: arrows_up(package_arrows(files, package)) for package in sorted(packages)}
    if not _is_one_package(root):
        up["the top level"] = arrows_up(package_arrows(files, ""))
    return Structure(
        {package: count for package, count in up.items() if count}, circles(files), repeats(_sources(root))
    )


# Imports -------------------------------------------------------------------------------------------------------------


def import_graph(root: Path) -> dict[str, Set[str]]:
    """Each module of the service and the benchmarks → the modules that its imports name.

    Importing a module also runs the `__init__` of its packages. This does not count as an arrow: otherwise a package that exports names
    of its modules would form a circle with each of them.
    """
    names = ("nightpress",) if _is_one_package(root) else FOLDERS
    # In a new process: this process has already imported `bench` from this checkout, and would not find the other.
    found = json.loads(run_python("-c", _GRAPH, *names, "bench", cwd=root))
    return {name: frozenset(imported) for name, imported in found.items()}


def _is_one_package(root: Path) -> bool:
    return (root / "nightpress" / "__init__.py").is_file()


def _sources(root: Path) -> dict[str, str]:
    files = (file for folder in (*FOLDERS, "bench") for file in sorted((root / folder).rglob("*.py")))
    return {file.relative_to(root).as_posix(): file.read_text() for file in files}


def package_arrows(files: Graph, package: str) -> dict[str, Set[str]]:
    """The arrows between the packages directly within a package. Each of these includes its subpackages."""
    prefix = f"{package}." if package else ""
    packages = {name.rpartition(".")[0] for name in files}

    def child(name: str) -> str | None:
        """The package directly within this one that a module belongs to, or None."""
        if not name.startswith(prefix):
            return None
        first = name.removeprefix(prefix).partition(".")[0]
        return first if prefix + first in packages else None

    arrows: defaultdict[str, set[str]] = defaultdict(set)
    for name, imported in files.items():
        if (own := child(name)) is not None:
            arrows[own] |= {other for target in imported if (other := child(target)) not in (None, own)}
    return dict(arrows)


def circles(graph: Graph) -> list[list[str]]:
    """The strongly connected components with more than one node."""
    reached = {node: _reached(graph, node) for node in graph}
    found = {frozenset(other for other in graph if other in reached[node] and node in reached[other]) for node in graph}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def _reached(graph: Graph, start: str) -> Set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        following = graph.get(waiting.pop(), frozenset()) - seen
        seen |= following
        waiting += following
    return seen


def arrows_up(graph: Graph) -> int:
    """The smallest number of arrows that run up, over all orders of the nodes."""
    return sum(_fewest_up(graph, circle) for circle in circles(graph))


def _fewest_up(graph: Graph, circle: list[str]) -> int:
    """The exact minimum, by dynamic programming over subsets: a subset's nodes are the lowest, and the next node is placed above them."""
    place = {name: at for at, name in enumerate(circle)}
    points_to = [sum(1 << place[other] for other in graph[name] if other in place) for name in circle]
    every = (1 << len(circle)) - 1
    fewest = {0: 0}
    for size in range(1, len(circle) + 1):
        layer: dict[int, int] = {}
        for lower in (sum(1 << at for at in some) for some in combinations(range(len(circle)), size - 1)):
            for at in range(len(circle)):
                if not lower >> at & 1:
                    up = (points_to[at] & ~lower & every & ~(1 << at)).bit_count()
                    stood = lower | 1 << at
                    layer[stood] = min(layer.get(stood, len(circle) ** 2), fewest[lower] + up)
        fewest |= layer
    return fewest[every]


# Repeats -------------------------------------------------------------------------------------------------------------


def repeats(sources: Mapping[str, str], window: int = REPEATED_LINES) -> list[Repeat]:
    """Pairs of places with at least `window` equal lines. sources: path → text."""
    kept = {path: list(_lines(text)) for path, text in sources.items()}
    places: defaultdict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for path, found in kept.items():
        for at in range(len(found) - window + 1):
            places[tuple(line for _, line in found[at : at + window])].append((path, at))
    pairs = {pair for same in places.values() for pair in combinations(same, 2)}
    pairs = {(pair, other) for pair, other in pairs if pair[0] != other[0] or abs(pair[1] - other[1]) >= window}
    found_repeats = []
    for (path, at), (other, there) in sorted(pairs):
        if ((path, at - 1), (other, there - 1)) in pairs:
            continue
        length = window
        while ((path, at + length - window + 1), (other, there + length - window + 1)) in pairs:
            length += 1
        found_repeats.append(Repeat(f"{path}:{kept[path][at][0]}", f"{other}:{kept[other][there][0]}", length))
    return found_repeats


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are compared, with their numbers from 1."""
    for number, raw in enumerate(text.splitlines(), 1):
        line = " ".join(_ASYNC.sub("", raw).split())
        if line and not line.startswith("#"):
            yield number, line


def figures_of(found: Structure) -> list[Figure]:
    return [
        Figure("arrows that run up", sum(found.arrows_up.values()), bar="<= 0"),
        Figure("circles of files", len(found.circles), bar="<= 0"),
        Figure("repeats", found.repeated, "pairs of places", bar="< 100"),
    ]


def main() -> int:
    parser = make_parser("structure", __doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1])
    given = parser.parse_args()
    found = structure(given.folder)
    for package, count in found.arrows_up.items():
        print(f"{count} arrows run up within {package}")
    for circle in found.circles:
        print(f"a circle: {', '.join(circle)}")
    for repeat in sorted(found.repeats, key=lambda repeat: -repeat.lines):
        print(f"{repeat.lines:3} lines  {repeat.first}  {repeat.second}")
    return finish("structure", figures_of(found), parser, given)


if __name__ == "__main__":
    sys.exit(main())
