"""The reference pages agree with the code, and every page is linked."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
_PAGE = re.compile(r"\bdocs/[\w/.-]+\.md\b")
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "name",
    [
        "settings.md",
        "errors.md",
        "recipes.md",
        "commands.md",
        "consumers.md",
        "report.schema.json",
        "../deploy/helm/nightpress/README.md",
    ],
)
def test_a_generated_page_is_in_step_with_the_code(name: str) -> None:
    page = runpy.run_path(str(DOCS / "reference.py"))["PAGES"][name]
    assert (DOCS / name).read_text() == page(), "run `python docs/reference.py`"


def test_every_page_is_in_the_navigation_or_in_the_list_of_decisions() -> None:
    listed = set(_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    decisions = {f"decisions/{name}" for name, _ in _LINK.findall((DOCS / "decisions" / "index.md").read_text())}
    assert listed | decisions == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    for name, anchor in _LINK.findall(_FENCED.sub("", page.read_text())):
        if "://" in name:
            continue
        target = page.parent / name if name else page
        assert target.exists(), name
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{name}#{anchor}"


def test_every_page_that_an_error_or_a_help_text_names_is_there() -> None:
    named = {
        (page, path.relative_to(ROOT).as_posix())
        for folder in ("api", "client", "core", "worker")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".html", ".j2", ".js"}
        for page in _PAGE.findall(path.read_text())
    }
    assert len(named) > 5
    assert [(page, where) for page, where in sorted(named) if not (ROOT / page).is_file()] == []


def _pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
        return
    for page in nav.values() if isinstance(nav, dict) else nav:
        yield from _pages(page)


def _anchors(page: Path) -> set[str]:
    """The anchors that mkdocs makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
