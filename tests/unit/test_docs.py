"""The reference pages say what the code does."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["settings.md", "errors.md", "recipes.md", "commands.md", "report.schema.json"])
def test_a_generated_page_is_in_step_with_the_code(name: str) -> None:
    page = runpy.run_path(str(DOCS / "reference.py"))["PAGES"][name]
    assert (DOCS / name).read_text() == page(), "run `python docs/reference.py`"
