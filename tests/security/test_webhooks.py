"""S12, F24: the signatures of webhooks' messages, and when a message is sent again."""

import datetime as dt
import json
import threading
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.backoff import PAUSES_S
from nightpress.core.service.webhooks.courier import Courier, pause_after
from nightpress.core.service.webhooks.outbound import Answer
from nightpress.core.service.webhooks.signing import SecretKeeper, sign, verify
from nightpress.core.wire.webhooks import WebhookCreate, WebhookUpdate
from tests.receiver import Receiver, reply
from tests.webhooks import TENANT, World


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
