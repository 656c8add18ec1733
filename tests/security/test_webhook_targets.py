"""S5, F24: the addresses that webhooks may have, and receivers with a wrong certificate, or that lead elsewhere, drip or flood."""

import ssl
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.backoff import PAUSES_S
from nightpress.core.service.webhooks import outbound
from nightpress.core.service.webhooks.courier import Courier
from nightpress.core.service.webhooks.outbound import post
from nightpress.core.service.webhooks.targets import check_target
from nightpress.core.wire.webhooks import WebhookUpdate
from tests.certificates import Certificate, make_certificate
from tests.patience import slowness
from tests.receiver import Receiver, reply
from tests.webhooks import LOOPBACK, TENANT, World

ATTACKS = [
    "https://127.0.0.1/",
    "https://169.254.169.254/latest/meta-data",
    "https://[::ffff:127.0.0.1]/",
    "https://[::1]/",
    "https://0x7f000001/",
    "https://2130706433/",
    "https://0177.0.0.1/",
    "https://127.1/",
    "https://localhost/",
    "https://10.0.0.1/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://0.0.0.0/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://[fc00::1]/",
    "https://[fd12:3456::1]/",
    "https://[fe80::1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[64:ff9b::a9fe:a9fe]/",
    "https://[2002:7f00:1::]/",
    "http://93.184.215.14/",
    "https://93.184.215.14:22/",
    "https://93.184.215.14:6379/",
    "https://user:pw@93.184.215.14/",
    "https://user@93.184.215.14/",
    "ftp://93.184.215.14/",
    "file:///etc/passwd",
    "https:///path",
    "https://xn--\u00df..invalid/",
    "https://" + "a" * 64 + ".example/",
    "https://93.184.215.14:99999/",
    "https://exa mple.com/",
    "https://93.184.215.14/\r\nX-Injected: 1",
    "https://name.invalid/",
]


@pytest.mark.parametrize("url", ATTACKS)
def test_no_address_inside_can_be_registered_or_reached(url: str):
    with pytest.raises(NightpressError) as caught:
        check_target(url)
    assert caught.value.code is ErrorCode.URL_NOT_ALLOWED


def test_an_address_inside_is_refused_where_a_webhook_is_made_and_where_it_is_edited(world: World, receiver: Receiver):
    inside = "https://169.254.169.254/latest/meta-data"
    hook, _ = world.hook(receiver.url)
    for attempt in (lambda: world.hook(inside), lambda: world.store.edit(TENANT, hook, WebhookUpdate(url=inside))):
        with pytest.raises(NightpressError) as caught:
            attempt()
        assert caught.value.code is ErrorCode.URL_NOT_ALLOWED
    assert [item.url for item in world.store.page(TENANT, cursor=None, limit=5)[0]] == [receiver.url]


def test_every_address_of_a_name_must_be_public():
    public, private = "93.184.215.14", "127.0.0.1"
    assert check_target("https://a.example/", resolve=lambda *_: [public]).address == public
    for addresses in ([private], [public, private], [private, public], [public, "::ffff:10.0.0.1"], []):
        with pytest.raises(NightpressError):
            check_target("https://localtest.example/", resolve=lambda *_, found=addresses: found)


def test_a_name_that_turns_private_after_registration_is_not_reached(
    tmp_path: Path, sqlite_url: str, receiver: Receiver
):
    answers = iter([["93.184.215.14"]])
    world = World(tmp_path, sqlite_url, inside=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "nightpress.core.service.webhooks.store.check_target",
            lambda url, nets: check_target(url, nets, resolve=lambda *_: next(answers)),
        )
        hook, _ = world.hook("https://rebind.example/")
    world.courier = Courier(world.store, world.settings, resolve=lambda *_: ["127.0.0.1"])
    world.end_a_job()
    assert world.try_all() == 1
    [delivery] = world.store.deliveries(TENANT, hook, cursor=None, limit=5)[0]
    [tried] = world.store.delivery(TENANT, hook, delivery.id).log
    assert tried.status is None
    assert "private" in str(tried.error)
    assert receiver.got == []
    world.engine.dispose()


def test_the_connection_goes_to_the_address_that_was_checked_and_keeps_the_name(receiver: Receiver):
    url = f"http://hooks.example:{receiver.port}/x?y=1"
    target = check_target(url, [LOOPBACK], resolve=lambda *_: ["127.0.0.1"])
    assert post(target, {"Host": f"hooks.example:{receiver.port}", "Content-Length": "2"}, b"{}").status == 204
    assert receiver.got[0][0]["host"] == f"hooks.example:{receiver.port}"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    folder = tmp_path_factory.mktemp("certificates")
    return {name: make_certificate(folder, name) for name in ("hooks.example", "other.example")}


def over_tls(world: World, receiver: Receiver, trusted: Certificate) -> str:
    """Register a receiver with a made-up host name. The courier resolves the name to this machine and trusts only `trusted`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "nightpress.core.service.webhooks.store.check_target",
            lambda url, nets: check_target(url, nets, resolve=here),
        )
        hook, _ = world.hook(receiver.url)
    world.courier = trusting(world, trusted)
    return hook


def trusting(world: World, certificate: Certificate) -> Courier:
    context = ssl.create_default_context(cafile=str(certificate.chain))
    return Courier(world.store, world.settings, resolve=here, context=context)


def here(_name: str, _port: int) -> list[str]:
    return ["127.0.0.1"]


def test_over_tls_the_address_that_was_checked_must_prove_the_name(world: World, certificates: dict[str, Certificate]):
    receiver = Receiver(certificates["hooks.example"])
    hook = over_tls(world, receiver, certificates["hooks.example"])
    world.end_a_job()
    assert world.try_all() == 1
    [delivery] = world.store.deliveries(TENANT, hook, cursor=None, limit=5)[0]
    assert delivery.state == "delivered"
    [(headers, _)] = receiver.got
    assert headers["host"] == f"hooks.example:{receiver.port}"
    assert receiver.named == ["hooks.example"]
    receiver.close()


@pytest.mark.parametrize(
    ("shown", "trusted", "fault"),
    [("other.example", "other.example", "Hostname mismatch"), ("hooks.example", "other.example", "self-signed")],
    ids=["another's name", "an issuer nobody trusts"],
)
def test_a_wrong_certificate_is_told_nothing_and_is_tried_again_until_it_is_right(
    world: World, certificates: dict[str, Certificate], shown: str, trusted: str, fault: str
):
    receiver = Receiver(certificates[shown])
    hook = over_tls(world, receiver, certificates[trusted])
    world.end_a_job()
    began = world.store.now()
    assert world.try_all(began) == 1
    [delivery] = world.store.deliveries(TENANT, hook, cursor=None, limit=5)[0]
    [tried] = world.store.delivery(TENANT, hook, delivery.id).log
    assert (delivery.state, tried.status) == ("pending", None)
    assert fault in str(tried.error)
    assert receiver.got == []
    assert receiver.named == ["hooks.example"]
    assert delivery.next_at is not None
    assert 0.79 * PAUSES_S[0] <= (delivery.next_at - began).total_seconds() <= 1.21 * PAUSES_S[0]
    receiver.show(certificates["hooks.example"])
    world.courier = trusting(world, certificates["hooks.example"])
    assert world.try_all(delivery.next_at) == 1
    assert world.store.delivery(TENANT, hook, delivery.id).state == "delivered"
    assert [headers["webhook-id"] for headers, _ in receiver.got] == [delivery.id]
    receiver.close()


def test_a_redirect_is_an_answer_and_is_not_followed(world: World, receiver: Receiver):
    receiver.answer = lambda handler: reply(handler, 302, Location=receiver.url)
    hook, _ = world.hook(receiver.url)
    world.end_a_job()
    world.try_all()
    assert len(receiver.got) == 1
    [delivery] = world.store.deliveries(TENANT, hook, cursor=None, limit=5)[0]
    assert (delivery.state, world.store.delivery(TENANT, hook, delivery.id).log[0].status) == ("pending", 302)


def test_a_receiver_that_drips_or_floods_is_cut_off(receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbound, "DEADLINE_S", 0.6)
    target = check_target(receiver.url, [LOOPBACK])

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(40):
            handler.wfile.write(b"X-A: b\r\n")
            handler.wfile.flush()
            time.sleep(0.1)

    def flood(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(1000):
                handler.wfile.write(b"x" * 65536)
        except OSError:
            return

    receiver.answer = drip
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        post(target, {"Content-Length": "0"}, b"")
    assert time.monotonic() - began < 3 * slowness()
    monkeypatch.setattr(outbound, "DEADLINE_S", 10.0)
    receiver.answer = flood
    assert len(post(target, {"Content-Length": "0"}, b"").body) == outbound.MAX_ANSWER
