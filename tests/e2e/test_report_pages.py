"""The report and the comparison in a real browser: no network, no errors, readable on a phone, in dark mode and on paper."""

from pathlib import Path

import pytest

from nightpress.core.compress import report as reports
from tests.browser import DESKTOP, PHONE, Browser, overflows, violations
from tests.reports import full_report


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pages")
    report, other = full_report(), full_report(verdict="rejected", recipe="int8-encoder", job="job_02")
    drawn = {
        "report": reports.render_html(report),
        "rejected": reports.render_html(other),
        "comparison": reports.render_comparison([report, other]),
    }
    for name, text in drawn.items():
        (folder / f"{name}.html").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["report", "rejected", "comparison"])
@pytest.mark.parametrize(("viewport", "dark"), [(DESKTOP, False), (PHONE, False), (DESKTOP, True), (PHONE, True)])
def test_a_page_asks_for_nothing_and_anyone_can_read_it(
    browser: Browser, pages: Path, name: str, viewport: dict[str, int], dark: bool
):
    url = (pages / f"{name}.html").as_uri()
    with browser.open(url, viewport=viewport, dark=dark) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert not overflows(seen.page)
        assert not violations(seen.page)
        assert seen.requests == [url]
        assert not seen.complaints


def test_the_verdict_and_the_gates_come_first(browser: Browser, pages: Path):
    with browser.open((pages / "rejected.html").as_uri()) as seen:
        verdict = seen.page.locator(".verdict").bounding_box()
        gates = seen.page.locator("table").first.bounding_box()
        assert verdict["y"] < gates["y"] < DESKTOP["height"]
        assert "Rejected" in seen.page.locator(".verdict").inner_text()
        assert "missed" in seen.page.locator("table").first.inner_text()


def test_it_prints_with_everything_on_the_paper(browser: Browser, pages: Path, tmp_path: Path):
    with browser.open((pages / "report.html").as_uri()) as seen:
        shown = "[...document.querySelectorAll('details')].every(one => one.offsetHeight > 2 * one.querySelector('summary').offsetHeight)"
        assert not seen.page.evaluate(shown)
        seen.page.emulate_media(media="print")
        assert seen.page.evaluate(shown)
        letters = [
            seen.page.evaluate(f"parseFloat(getComputedStyle(document.querySelector('{selector}')).fontSize)")
            for selector in ("body", "td")
        ]
        assert letters[1] <= letters[0]
        # A cell that is too narrow for its text would break it into several lines, and be higher than 40 px.
        assert seen.page.evaluate(
            "[...document.querySelectorAll('td.good, td.bad')].every(one => one.getClientRects()[0].height < 40)"
        )
        assert not overflows(seen.page)
        paper = seen.page.pdf(format="A4", prefer_css_page_size=True)
    assert paper.startswith(b"%PDF")
    assert 2 <= paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") <= 15
