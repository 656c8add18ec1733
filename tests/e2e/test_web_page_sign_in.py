"""Signing in on the page in a real browser, at a real provider on another site."""

from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, violations
from tests.oidc import Provider, serve_with_provider


def enter(page: Any, login: str) -> None:
    """Fill in the provider's two forms."""
    page.fill("input[name=login]", login)
    page.fill("input[name=password]", "x")
    page.click("button[type=submit]")
    page.click("button[type=submit]:has-text('Continue')")


@pytest.mark.slow
def test_a_person_signs_in_works_changes_the_tenant_and_signs_out(browser: Browser, tmp_path: Path):
    with serve_with_provider(tmp_path, oidc_name="Example accounts") as (api, provider):
        provider.put("ada", ["engineers", "watchers"])
        with browser.open(f"{api.url}/#/access") as seen:
            page = seen.page
            page.wait_for_selector("a:has-text('Sign in with Example accounts')")
            assert violations(page) == []
            page.click("a:has-text('Sign in with Example accounts')")
            enter(page, "ada")
            page.wait_for_selector("h1:has-text('Keys')")
            assert page.url == f"{api.url}/#/access"
            page.wait_for_selector("tr:has-text('ada@example.com') .badge:has-text('active')")
            assert violations(page) == []
            page.get_by_label("Name").fill("robot")
            page.click("button:has-text('Make it')")  # a request that changes something
            page.wait_for_selector("dialog pre")
            page.click("dialog button:has-text('I have it')")
            page.get_by_label("Tenant").select_option("watch")
            page.click("button[type=submit]:has-text('Continue')")  # the provider asks for consent each time
            page.wait_for_selector("h1:has-text('Jobs')")
            assert page.get_by_label("Tenant").input_value() == "watch"
            page.click("text=Sign out")
            page.wait_for_selector("h1:has-text('Sign in')")
            assert page.evaluate("document.cookie") == ""
            _denied(seen.page, api.url, provider)


def _denied(page: Any, url: str, provider: Provider) -> None:
    """Whoever has no group is told so in words."""
    provider.put("ada", ["strangers"])
    page.click("a:has-text('Sign in with Example accounts')")
    page.click("button[type=submit]:has-text('Continue')")
    page.wait_for_selector("[role=alert]:has-text('none of your groups')")
    assert page.url.startswith(url)
