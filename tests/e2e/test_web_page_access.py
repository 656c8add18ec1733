"""The web page in a real browser: signing in, keys, the quotas of tenants, webhooks and deliveries."""

import datetime as dt
import re

from playwright.sync_api import expect

from nightpress.client import Client
from nightpress.core.service.compose import Resources
from nightpress.core.service.deliveries.courier import DeliveryCourier
from nightpress.core.service.webhooks.courier import Courier
from nightpress.core.service.webhooks.signing import open_keeper, verify
from nightpress.core.service.webhooks.store import WebhookStore
from tests.browser import Browser, overflows, signed_in, violations
from tests.face import RECIPE, Face
from tests.receiver import Receiver, reply


def test_a_wrong_key_is_refused_and_a_right_one_lets_in(browser: Browser, face: Face):
    with browser.open(face.url) as seen:
        page = seen.page
        page.fill("input[name=key]", "np_wrong")
        page.press("input[name=key]", "Enter")
        page.wait_for_selector("[role=alert]")
        page.fill("input[name=key]", face.key)
        page.press("input[name=key]", "Enter")
        page.wait_for_selector("h1:has-text('Jobs')")
        page.click("text=Sign out")
        page.wait_for_selector("h1:has-text('Sign in')")
        assert page.evaluate("sessionStorage.length + localStorage.length") == 0


def test_a_key_in_the_address_is_taken_and_leaves_it(browser: Browser, face: Face):
    with signed_in(browser, face) as seen:
        seen.page.wait_for_selector("h1:has-text('Jobs')")
        assert face.key not in seen.page.url
        assert not any(face.key in url for url in seen.requests)


def test_a_key_is_made_with_scopes_and_an_expiry_shown_once_rotated_and_revoked(browser: Browser, face: Face):
    with signed_in(browser, face, "/access") as seen:
        page = seen.page
        page.get_by_label("Name").fill("robot")
        page.get_by_label("Days until it expires").fill("30")
        page.get_by_label("keys:read").check()
        page.click("button:has-text('Make it')")
        made = page.wait_for_selector("dialog pre").inner_text()
        page.click("dialog button:has-text('I have it')")
        page.wait_for_selector("tr:has-text('robot')")
        assert made not in page.content()
        with Client(face.url, made) as client:
            me = client.me()
            assert me.key_id in page.inner_text("tr:has-text('robot')")
            assert {"jobs:write", "keys:read"} <= set(me.scopes)
            assert {"keys:write", "admin"}.isdisjoint(me.scopes)
            ends = client.keys.get(me.key_id).expires_at
        assert ends is not None
        assert 29 < (ends - dt.datetime.now(dt.UTC)) / dt.timedelta(days=1) <= 30

        page.click(f"button[aria-label='Rotate {me.key_id}']")
        page.get_by_label("The old key keeps working for").select_option("not at all")
        assert violations(page) == []
        page.click("dialog button:has-text('Make the new key')")
        renewed = page.wait_for_selector("dialog pre").inner_text()
        page.click("dialog button:has-text('I have it')")
        page.wait_for_selector(f"tr:has-text('{me.key_id} robot'):not(:has-text('after')) .badge:has-text('expired')")
        page.wait_for_selector(f"tr:has-text('after {me.key_id}') .badge:has-text('active')")
        with Client(face.url, renewed) as client:
            assert client.me().scopes == me.scopes
        page.click(f"tr:has-text('after {me.key_id}') button:has-text('Revoke')")
        page.click("dialog button[value=yes]")
        page.wait_for_selector(f"tr:has-text('after {me.key_id}') .badge:has-text('revoked')")


def test_who_rotates_the_key_in_use_stays_signed_in_with_its_successor(browser: Browser, face: Face):
    with face.client() as client:
        own = client.keys.create("visitor", ["jobs:read", "keys:read", "keys:write"]).key
    with browser.open(f"{face.url}/#key={own}") as seen:
        page = seen.page
        page.click("nav a:has-text('Keys')")
        page.click("tr:has-text('in use') button:has-text('Rotate')")
        page.get_by_label("The old key keeps working for").select_option("not at all")
        page.click("dialog button:has-text('Make the new key')")
        renewed = page.wait_for_selector("dialog pre").inner_text()
        page.click("dialog button:has-text('I have it')")
        page.wait_for_selector("tr:has-text('after'):has-text('in use')")
        page.click("nav a:has-text('Jobs')")
        page.wait_for_selector("h1:has-text('Jobs')")
        assert page.evaluate("sessionStorage.getItem('nightpress.key')") == renewed
        assert page.evaluate("localStorage.length") == 0


def test_a_webhook_is_made_tried_looked_into_rotated_switched_off_and_deleted(browser: Browser, face: Face):
    receiver = Receiver()
    store = WebhookStore(face.engine, open_keeper(face.settings), face.settings)
    courier = Courier(store, face.settings)

    def deliver() -> None:
        for due in store.take_due(store.now()):
            courier.attempt(due)

    with signed_in(browser, face, "/webhooks") as seen:
        page = seen.page
        page.wait_for_selector(".empty:has-text('No webhooks yet')")
        page.click("text=New webhook")
        page.get_by_label("Address").fill("http://169.254.169.254/")
        page.click("form button:has-text('Make it')")
        assert "can't be used" in page.wait_for_selector("form [role=alert]").inner_text()
        page.get_by_label("Address").fill(receiver.url)
        page.get_by_label("a job was cancelled").uncheck()
        page.click("form button:has-text('Make it')")
        secret = page.wait_for_selector("dialog pre").inner_text()
        assert violations(page) == []
        page.click("dialog button:has-text('I have it')")
        page.wait_for_selector(f"h1:has-text('{receiver.url}')")
        page.wait_for_selector(".empty:has-text('Nothing was sent yet')")
        assert secret not in page.content()

        receiver.answer = lambda handler: reply(handler, 503)
        page.click("button:has-text('Send a test')")
        page.wait_for_selector("tr:has-text('webhook.test') .badge:has-text('pending')")
        deliver()
        page.click("button[aria-label^='Show']")
        page.wait_for_selector("td:has-text('status 503')")
        assert "webhook.test" in page.inner_text("[aria-labelledby=opened] pre")
        assert violations(page) == []
        receiver.answer = lambda handler: reply(handler, 204)
        page.click("button[aria-label$=' again']")
        page.wait_for_selector("#announce:has-text('sent again')", state="attached")
        deliver()
        page.wait_for_selector("tr:has-text('webhook.test') .badge:has-text('delivered')")
        assert all(verify(secret, headers, body) for headers, body in receiver.got)

        # The buttons act on the last change, even if the page can read nothing for now.
        reads = re.compile("/v1/webhooks/")
        page.route(reads, lambda route: route.abort() if route.request.method == "GET" else route.continue_())
        page.click("button:has-text('Rotate the secret')")
        page.click("dialog button[value=yes]")
        renewed = page.wait_for_selector("dialog pre").inner_text()
        page.click("dialog button:has-text('I have it')")
        assert renewed.startswith("whsec_")
        assert renewed != secret
        page.click("button:has-text('Switch off')")  # based on the version that the rotation made
        page.wait_for_selector("dd .badge:has-text('disabled')")
        page.unroute(reads)
        page.click("button:has-text('Edit')")
        page.get_by_label("a job succeeded").uncheck()
        page.click("form button:has-text('Save')")
        expect(page.locator("dd", has_text="a job failed")).to_have_text("a job failed")
        page.click("button:has-text('Delete')")
        page.click("dialog button[value=yes]")
        page.wait_for_selector(".empty:has-text('No webhooks yet')")

        page.click("text=New webhook")
        expect(page.get_by_label("Text")).to_be_hidden()
        page.get_by_label("Kind").select_option("slack")
        page.get_by_label("Text").fill("$model is $verdict")
        page.get_by_label("Address").fill(receiver.url)
        page.get_by_label("a result was promoted").check()
        assert violations(page) == []
        page.click("form button:has-text('Make it')")
        expect(page.locator("dd", has_text="Slack, or what")).to_be_visible()  # at once: there is no secret to show
        expect(page.locator("dd", has_text="$model is $verdict")).to_be_visible()
        expect(page.locator("dd", has_text="a result was promoted")).to_be_visible()
        expect(page.locator("button:has-text('Rotate the secret')")).to_have_count(0)
    courier.close()
    receiver.close()


def test_an_administrator_sees_what_tenants_use_and_sets_their_quotas(browser: Browser, face: Face, model_id: str):
    with face.client() as client, signed_in(browser, face, "/access") as seen:
        page = seen.page
        page.click("text=Tenants and quotas")
        page.click("button[aria-label='Quotas of default']")
        page.get_by_label("Running jobs").fill("3")
        assert violations(page) == []
        page.click("form button:has-text('Save')")
        page.wait_for_selector("tr:has-text('default') td:has-text('0 of 3')")
        assert client.tenants.get("default").own.max_running_jobs == 3
        page.click("button[aria-label='Quotas of default']")
        page.get_by_label("Running jobs").fill("")
        page.click("form button:has-text('Save')")
        page.wait_for_selector("tr:has-text('default') td[data-of='Running']:text-is('0')")
        assert client.tenants.get("default").own.max_running_jobs is None

        page.get_by_label("Name").fill("search-team")
        page.click("button:has-text('To its keys')")
        page.wait_for_selector("h1:has-text('Keys of search-team')")
        page.wait_for_selector(".empty:has-text('No keys')")
        page.get_by_label("Name").fill("theirs")
        page.click("button:has-text('Make it')")
        theirs = page.wait_for_selector("dialog pre").inner_text()
        page.click("dialog button:has-text('I have it')")
        page.wait_for_selector("tr:has-text('theirs')")
        assert violations(page) == []
        with Client(face.url, theirs) as their:
            assert their.me().tenant_id == "search-team"
        page.click("text=Tenants and quotas")
        page.wait_for_selector("a[aria-label='Keys of search-team']")


def test_a_result_is_delivered_tried_again_and_cancelled(browser: Browser, face: Face, model_id: str):
    resources = Resources(face.settings, face.engine)
    courier = DeliveryCourier(
        resources.deliveries,
        resources.credentials,
        resources.signing,
        face.engine,
        resources.objects,
        face.settings,
    )
    with face.client() as client:
        job = client.jobs.submit(model_id, RECIPE).id
        face.succeed(face.claim())
    with signed_in(browser, face, f"/jobs/{job}") as seen:
        page = seen.page
        page.click("main a:has-text('Deliveries')")
        page.wait_for_selector(".empty:has-text('Nothing is delivered yet')")
        page.get_by_label("Destination").fill("s3://elsewhere/x")
        page.click("form button:has-text('Deliver')")
        assert "operator" in page.wait_for_selector("form [role=alert]").inner_text()
        page.get_by_label("Destination").fill("hf://acme/{model}")
        page.click("form button:has-text('Deliver')")
        page.wait_for_selector("tr:has-text('hf://acme/') .badge:has-text('pending')")
        courier.advance()
        page.wait_for_selector("tr:has-text('No credentials are stored') .badge:has-text('failed')")
        page.click("button[aria-label^='Show']")
        page.wait_for_selector("[aria-labelledby=opened] td:has-text('No credentials are stored')")
        assert violations(page) == []
        page.click("button[aria-label^='Try']")
        page.wait_for_selector("tr .badge:has-text('pending')")
        page.click("button[aria-label^='Cancel']")
        page.click("dialog button[value=yes]")
        page.wait_for_selector("tr .badge:has-text('cancelled')")
        assert overflows(page) == []
        assert [problem for problem in seen.complaints if "403" not in problem] == []
    courier.close()
