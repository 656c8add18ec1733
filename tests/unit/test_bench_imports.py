"""What a benchmark imports is there. mypy does not look at benchmarks, and nobody runs all of them at every commit."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
_OURS = {"bench", "nightpress", "tests"}


def _imported(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of each import from our own packages, in functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] in _OURS:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", sorted(BENCH.glob("*.py")), ids=lambda file: file.stem)
def test_what_a_benchmark_imports_is_there(file: Path) -> None:
    for module, name in _imported(file):
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")  # a module of a package
