"""docs/faults.md names at least one test for each fault and each invariant, and these tests exist."""

import ast
import re

from tests.service import ROOT

_ROW = re.compile(r"^\| ([FI]\d+) \|.*\|$", re.M)
_TEST = re.compile(r"`((?:\w+/)*\w+\.py)::(\w+)`")


def test_every_fault_is_caused_by_tests_that_exist():
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = {row[1]: _TEST.findall(row[0]) for row in _ROW.finditer(page)}
    assert rows.keys() == {f"F{n}" for n in range(1, 45)} | {f"I{n}" for n in range(1, 7)}
    assert all(rows.values()), "a row names no test"
    for file, test in _TEST.findall(page):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_every_test_of_a_fault_is_named():
    named = {test for _, test in _TEST.findall((ROOT / "docs" / "faults.md").read_text())}
    for path in sorted((ROOT / "tests" / "faults").glob("test_f*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and re.match(r"test_f\d", node.name):
                assert node.name in named, f"{path.name}::{node.name} is in no row of docs/faults.md"
