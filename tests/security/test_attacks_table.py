"""docs/security.md names at least one test for each attack, and these tests exist."""

import ast
import re

import pytest

from tests.service import ROOT

_ROW = re.compile(r"^\| S(\d+) \|.*\|$", re.M)
_TEST = re.compile(r"`((?:\w+/)*\w+\.py)::(\w+)`")


@pytest.mark.slow
def test_every_attack_is_tried_by_tests_that_exist():
    page = (ROOT / "docs" / "security.md").read_text()
    rows = {int(row[1]): _TEST.findall(row[0]) for row in _ROW.finditer(page)}
    assert rows.keys() >= set(range(1, 17))
    for number, named in rows.items():
        assert named, f"S{number} names no test"
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (
                f"{file}::{test}"
            )
