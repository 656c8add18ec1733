"""A headless Chromium for the tests of pages. Where no Chromium is installed, these tests are skipped with a reason.

`nightpress` itself needs no browser. `NIGHTPRESS_TEST_CHROMIUM` names the program; without it, the usual commands of Debian and
Chrome are tried.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.face import Face

_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = {"width": 320, "height": 700}
DESKTOP = {"width": 1280, "height": 900}


@dataclass(frozen=True)
class Seen:
    """An open page, the URLs that it requested, and its console messages and errors."""

    page: Any  #: playwright.sync_api.Page
    requests: list[str]  #: URLs
    complaints: list[str]  #: the console's errors and warnings, and uncaught exceptions


class Browser:
    """Opens pages, each in a separate browser context."""

    def __init__(self, library: Any) -> None:
        self._library = library

    @contextmanager
    def open(self, url: str, *, viewport: dict[str, int] = DESKTOP, dark: bool = False) -> Iterator[Seen]:
        """Open the page at a URL and record what it requests and logs."""
        context = self._library.new_context(viewport=viewport, color_scheme="dark" if dark else "light")
        page = context.new_page()
        seen = Seen(page, [], [])
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on(
            "console", lambda said: seen.complaints.append(said.text) if said.type in {"error", "warning"} else None
        )
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        try:
            page.goto(url)
            yield seen
        finally:
            context.close()


def find_chromium() -> str | None:
    named = os.environ.get("NIGHTPRESS_TEST_CHROMIUM")
    return named or next((found for name in _COMMANDS if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser for many pages. Skips the test where no Chromium is installed."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium here: `apt-get install chromium`, or set NIGHTPRESS_TEST_CHROMIUM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            yield Browser(browser)
        finally:
            browser.close()


def violations(page: Any) -> list[str]:
    """The violations that axe-core finds, one line for each rule and element. The script comes from a package, not from the network."""
    import axe_playwright_python

    script = Path(axe_playwright_python.__file__).parent / "axe.min.js"
    # The page's content security policy forbids foreign scripts. The debugger's Runtime.evaluate bypasses the policy.
    session = page.context.new_cdp_session(page)

    def run(expression: str) -> Any:
        found = session.send(
            "Runtime.evaluate", {"expression": expression, "awaitPromise": True, "returnByValue": True}
        )
        return found["result"].get("value")

    if not run("'axe' in window"):  # once for a document, whose view changes
        run(f"{script.read_text()}; 0")
    found = run("axe.run(document, {resultTypes: ['violations']}).then(({violations}) => violations)")
    session.detach()
    return [f"{violation['id']}: {node['target']}" for violation in found for node in violation["nodes"]]


def overflows(page: Any) -> list[str]:
    """Elements that reach beyond the page's right edge, which makes a phone scroll sideways."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
            .filter(one => getComputedStyle(one).position !== 'absolute' && one.getClientRects().length
                && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .map(one => one.tagName + '.' + (one.getAttribute('class') ?? '')).slice(0, 10)"""
    )
    return found


def signed_in(browser: Browser, face: Face, view: str = "/jobs", **look: Any) -> Any:
    """Open a view of the web page with the installation's key."""
    return browser.open(f"{face.url}/#key={face.key}", **look) if view == "/jobs" else _then(browser, face, view, look)


class _then:  # noqa: N801 - used like a function
    """A context manager that signs in and then goes to a view."""

    def __init__(self, browser: Browser, face: Face, view: str, look: dict[str, Any]) -> None:
        self._opened = browser.open(f"{face.url}/#key={face.key}", **look)
        self._view = view

    def __enter__(self) -> Seen:
        seen = self._opened.__enter__()
        seen.page.wait_for_selector("nav a[aria-current]")
        seen.page.evaluate(f"location.hash = '#{self._view}'")
        return seen

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(*error)
