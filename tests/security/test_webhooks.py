"""S5, S12, F24: the targets that webhooks may have, their signatures, and what misbehaving receivers can do."""

import datetime as dt
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Iterator
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.database import make_engine
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.webhooks import outbound
from nightpress.core.service.webhooks.courier import PAUSES_S, Courier, pause_after
from nightpress.core.service.webhooks.outbound import Answer, post
from nightpress.core.service.webhooks.signing import SecretKeeper, open_keeper, sign, verify
from nightpress.core.service.webhooks.store import WebhookStore
from nightpress.core.service.webhooks.targets import check_target
from nightpress.core.settings import Settings
from nightpress.core.wire.webhooks import WebhookCreate, WebhookUpdate
from tests.certificates import Certificate, make_certificate
from tests.jobs import add_model, claim, submit, succeeded
from tests.receiver import Receiver, reply

TENANT = "default"
LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


class World:
    def __init__(self, folder: Path, sql_url: str, *, inside: bool = True) -> None:
        self.settings = Settings(
            _env_file=None, data_dir=folder, database_url=sql_url, webhook_networks=[LOOPBACK] if inside else []
        )
        self.engine = make_engine(sql_url)
        add_model(self.engine)
        self.jobs = JobStore(self.engine)
        self.store = WebhookStore(self.engine, open_keeper(self.settings), self.settings)
        self.courier = Courier(self.store, self.settings)

    def hook(self, url: str) -> tuple[str, str]:
        made = self.store.create(TENANT, WebhookCreate(url=url, events=["job.succeeded", "job.failed"]))
        return made.webhook.id, made.secret

    def end_a_job(self) -> str:
        job_id = submit(self.jobs)
        claimed = claim(self.jobs)
        assert self.jobs.attempts.finish(claimed.lease, succeeded(claimed.lease))
        return job_id

    def try_all(self, now: dt.datetime | None = None) -> int:
        taken = self.store.take_due(now or self.store.now())
        for due in taken:
            self.courier.attempt(due, now)
        return len(taken)


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str) -> Iterator[World]:
    world = World(tmp_path, sqlite_url)
    yield world
    world.courier.close()
    world.engine.dispose()


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
    assert time.monotonic() - began < 3
    monkeypatch.setattr(outbound, "DEADLINE_S", 10.0)
    receiver.answer = flood
    assert len(post(target, {"Content-Length": "0"}, b"").body) == outbound.MAX_ANSWER


def test_a_message_is_signed_and_what_is_tampered_old_or_anothers_is_not_believed(world: World, receiver: Receiver):
    hook, secret = world.hook(receiver.url)
    job_id = world.end_a_job()
    world.try_all()
    [(headers, body)] = receiver.got
    assert verify(secret, headers, body)
    assert json.loads(body)["type"] == "job.succeeded"
    assert json.loads(body)["data"]["id"] == job_id
    assert headers["webhook-id"].startswith("msg_")
    assert not verify(secret, headers, body + b" ")
    sent_at = int(headers["webhook-timestamp"])
    assert verify(secret, headers, body, now=sent_at + 299)
    assert verify(secret, headers, body, now=sent_at - 299)
    assert not verify(secret, headers, body, now=sent_at + 301)
    assert not verify(secret, headers, body, now=sent_at - 301)
    assert not verify(SecretKeeper(b"other").secret(hook, 1), headers, body)
    for name in ("webhook-id", "webhook-timestamp", "webhook-signature"):
        assert not verify(secret, {**headers, name: "msg_1"}, body)
    assert world.store.deliveries(TENANT, hook, cursor=None, limit=5)[0][0].state == "delivered"


def test_the_signature_is_that_of_the_standards_own_example():
    """The test vector in the text of the Standard Webhooks specification, which every library for it checks."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = sign([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_two_secrets_sign_while_one_replaces_the_other(world: World, receiver: Receiver):
    hook, old = world.hook(receiver.url)
    new = world.store.rotate(TENANT, hook, overlap_s=3600).secret
    assert old != new
    world.end_a_job()
    world.try_all()
    headers, body = receiver.got[0]
    assert verify(old, headers, body)
    assert verify(new, headers, body)
    last = world.store.rotate(TENANT, hook, overlap_s=0).secret
    world.end_a_job()
    world.try_all()
    headers, body = receiver.got[1]
    assert verify(last, headers, body)
    assert not verify(new, headers, body)


def test_no_secret_stands_in_the_database(world: World, receiver: Receiver, tmp_path: Path):
    _, secret = world.hook(receiver.url)
    database = Path(world.settings.sql_url.removeprefix("sqlite:///"))
    stored = b"".join(path.read_bytes() for path in database.parent.glob(database.name + "*"))
    assert b"whsec_" not in stored
    assert secret.removeprefix("whsec_").encode() not in stored
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0


def test_410_switches_the_webhook_off(world: World, receiver: Receiver):
    receiver.answer = lambda handler: reply(handler, 410)
    hook, _ = world.hook(receiver.url)
    world.end_a_job()
    world.try_all()
    view = world.store.get(TENANT, hook)
    assert (view.enabled, view.disabled_reason) == (False, "The receiver answered 410 Gone.")
    world.end_a_job()
    assert world.try_all() == 0
    assert world.store.edit(TENANT, hook, WebhookUpdate(enabled=True)).disabled_reason is None


def test_a_receiver_that_is_down_for_three_days_is_tried_ten_times_under_one_id(world: World, receiver: Receiver):
    receiver.answer = lambda handler: reply(handler, 503)
    hook, _ = world.hook(receiver.url)
    job_id = world.end_a_job()
    now, start = world.store.now(), world.store.now()
    moments = []
    while True:
        [delivery] = world.store.deliveries(TENANT, hook, cursor=None, limit=5)[0]
        if delivery.next_at is None:
            break
        now = max(now, delivery.next_at)
        moments.append((now - start).total_seconds())
        assert world.try_all(now) == 1
    assert len(receiver.got) == len(PAUSES_S) + 1
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    pauses = [later - sooner for sooner, later in pairwise(moments)]
    assert all(0.79 * wanted <= pause <= 1.21 * wanted for pause, wanted in zip(pauses, PAUSES_S, strict=True))
    assert moments[-1] > 2.4 * 24 * 3600
    assert delivery.state == "failed"
    job = world.jobs.reader.get(TENANT, job_id)
    assert job is not None
    assert job.state == "succeeded"
    receiver.answer = lambda handler: reply(handler, 200)
    world.store.redeliver(TENANT, hook, delivery.id)
    world.try_all()
    assert world.store.delivery(TENANT, hook, delivery.id).state == "delivered"
    assert receiver.got[-1][0]["webhook-id"] == delivery.id


@pytest.mark.parametrize(
    ("asked", "at_least"),
    [
        ("600", 600),
        ("1", 4),
        ("nonsense", 4),
        ("-5", 4),
        ("9" * 30, 86400),
        ("²", 4),
        ("٣", 4),
        ("9" * 5000, 4),
        ("Mon, 99 Jan 99999 00:00:00 GMT", 4),
    ],
)
def test_retry_after_makes_a_pause_longer_and_never_shorter(asked: str, at_least: float):
    pause = pause_after(1, Answer(429, {"retry-after": asked}, b""), dt.datetime.now(dt.UTC))
    assert pause is not None
    assert at_least <= pause <= max(at_least, 6)


def test_retry_after_as_a_date_is_counted_from_the_databases_time():
    now = dt.datetime(2031, 5, 6, 7, 8, 9, tzinfo=dt.UTC)
    asked = Answer(503, {"retry-after": format_datetime(now + dt.timedelta(minutes=10), usegmt=True)}, b"")
    assert pause_after(1, asked, now) == 600


@pytest.mark.parametrize("asked", ["\xb2", "9" * 5000, "Mon, 01 Jan 0001 00:00:00 +9999", "Thu, 01 Jan 1970 00:00:00"])
def test_a_receiver_that_asks_for_nonsense_is_settled_all_the_same(world: World, receiver: Receiver, asked: str):
    hook, _ = world.hook(receiver.url)
    receiver.answer = lambda handler: reply(handler, 503, Retry_After=asked)
    world.end_a_job()
    assert world.try_all() == 1
    [delivery] = world.store.deliveries(TENANT, hook, cursor=None, limit=9)[0]
    assert [answer.status for answer in world.store.delivery(TENANT, hook, delivery.id).log] == [503]


def test_two_couriers_send_each_message_once(world: World, receiver: Receiver):
    world.hook(receiver.url)
    for _ in range(10):
        world.end_a_job()
    couriers = [Courier(world.store, world.settings) for _ in range(2)]
    threads = [threading.Thread(target=courier.deliver) for courier in couriers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for courier in couriers:
        courier.close()
    while world.try_all():
        pass
    ids = [headers["webhook-id"] for headers, _ in receiver.got]
    assert len(ids) == len(set(ids)) == 10


def test_a_cancelled_subscription_and_another_tenant_hear_nothing(world: World, receiver: Receiver):
    made: Any = world.store.create("other", WebhookCreate(url=receiver.url, events=["job.succeeded"]))
    hook, _ = world.hook(receiver.url)
    world.store.edit(TENANT, hook, WebhookUpdate(events=["job.failed"]))
    world.end_a_job()
    assert world.try_all() == 0
    with pytest.raises(NightpressError) as caught:
        world.store.get(TENANT, made.webhook.id)
    assert caught.value.code is ErrorCode.NOT_FOUND
