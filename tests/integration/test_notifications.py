"""Slack and e-mail are told of jobs, studies, schedules and promotions: a real HTTP receiver and a real SMTP server get the messages."""

import datetime as dt
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import ValidationError

from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.notifications.mail import send_mail
from nightpress.core.service.notifications.messages import Message, message_of
from nightpress.core.service.webhooks.courier import Courier
from nightpress.core.service.webhooks.outbox import note_event
from nightpress.core.service.webhooks.signing import open_keeper
from nightpress.core.service.webhooks.store import WebhookStore
from nightpress.core.wire.webhooks import TEMPLATE_FIELDS, DeliveryView, WebhookCreate, WebhookUpdate
from tests.certificates import make_certificate
from tests.integration.test_schedules import World as ScheduleWorld
from tests.mail_server import MailServer
from tests.receiver import Receiver
from tests.servers import free_port
from tests.studies import StudyWorld
from tests.webhooks import TENANT, World

PAGE = "https://nights.example.com/"


@pytest.fixture
def mailbox() -> Iterator[MailServer]:
    server = MailServer()
    yield server
    server.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, mailbox: MailServer) -> Iterator[World]:
    world = World(tmp_path, sqlite_url)
    configure(world, smtp_url=f"smtp://127.0.0.1:{mailbox.port}")
    yield world
    world.engine.dispose()


def configure(world: World, *, smtp_url: str, domains: tuple[str, ...] = ("example.com",)) -> None:
    given: dict[str, Any] = {"smtp_url": smtp_url, "mail_domains": list(domains), "public_url": PAGE}
    given |= {"mail_from": "Nightpress <nights@example.org>"}
    checked = type(world.settings).model_validate(world.settings.model_dump() | given)
    world.settings = checked
    world.store = WebhookStore(world.engine, open_keeper(checked), checked)
    world.courier = Courier(world.store, checked)


def add(world: World, url: str, *events: str, **fields: Any) -> str:
    wanted = WebhookCreate.model_validate({"url": url, "events": list(events) or ["job.succeeded"], **fields})
    return world.store.create(TENANT, wanted).webhook.id


def last(world: World, hook: str) -> DeliveryView:
    [newest, *_], _ = world.store.deliveries(TENANT, hook, cursor=None, limit=1)
    return world.store.delivery(TENANT, hook, newest.id)


def test_slack_gets_a_text_without_markup_of_others(world: World, receiver: Receiver) -> None:
    hook = add(world, receiver.url, kind="slack", template="$model <!channel> & $verdict\n$link")
    job_id = world.end_a_job()
    world.try_all()
    [(headers, body)] = receiver.got
    assert json.loads(body) == {"text": f"tiny &lt;!channel&gt; &amp; accepted\n{PAGE}#/jobs/{job_id}"}
    assert "webhook-signature" not in headers
    assert last(world, hook).state == "delivered"
    with pytest.raises(NightpressError) as refused:
        world.store.rotate(TENANT, hook, overlap_s=0)
    assert refused.value.code is ErrorCode.CONFLICT


def test_a_mailbox_gets_a_mail_that_can_be_recognised_when_it_comes_again(world: World, mailbox: MailServer) -> None:
    hook = add(world, "mailto:team@example.com", kind="email")
    job_id = world.end_a_job()
    world.try_all()
    world.store.redeliver(TENANT, hook, last(world, hook).id)
    world.try_all()
    first, again = mailbox.got
    assert mailbox.recipients == ["team@example.com"] * 2
    assert first["Subject"] == "✓ Job tiny · test: succeeded, accepted"
    assert first["From"] == "Nightpress <nights@example.org>"
    assert first["Message-ID"] == again["Message-ID"] == f"<{last(world, hook).id}@example.org>"
    text = first.get_content()
    assert f"nightpress report {job_id}" in text
    assert f"{PAGE}#/jobs/{job_id}" in text


@pytest.mark.slow
def test_what_a_mail_server_refuses_is_tried_again_or_given_up(world: World) -> None:
    gone = add(world, "mailto:nobody@example.com", kind="email")
    full = add(world, "mailto:full@example.com", kind="email")
    world.end_a_job()
    world.try_all()
    refused, later = last(world, gone), last(world, full)
    assert (refused.state, refused.log[0].status) == ("failed", 550)
    assert (later.state, later.log[0].status) == ("pending", 452)
    configure(world, smtp_url=f"smtp://127.0.0.1:{free_port()}")
    world.try_all(world.store.now() + dt.timedelta(hours=1))
    down = last(world, full)
    assert (down.state, down.attempts, down.log[-1].status) == ("pending", 2, None)
    assert "refused" in (down.log[-1].error or "")


def test_a_password_is_sent_over_tls_only(
    tmp_path: Path, world: World, mailbox: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path, "mail.example")
    own = socket.getaddrinfo

    def resolve(host: Any, *rest: Any, **more: Any) -> Any:
        return own("127.0.0.1" if host == "mail.example" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)  # the name of the certificate leads to this machine
    secure = MailServer(certificate)
    trust = ssl.create_default_context(cafile=str(certificate.chain))
    message, at = Message("Hello", "Hello"), world.store.now()

    def send(port: int, password: str, context: ssl.SSLContext | None) -> tuple[int, str]:
        settings = world.settings.model_validate(
            world.settings.model_dump()
            | {"smtp_url": f"smtp://nightpress:{quote(password, safe='')}@mail.example:{port}"}
        )
        return send_mail("team@example.com", message, settings, message_id="msg_1", at=at, context=context)

    try:
        assert send(secure.port, "s3cret/:@%", trust)[0] == 250
        assert [mail["Subject"] for mail in secure.got] == ["Hello"]
        with pytest.raises(ConnectionError, match="535"):
            send(secure.port, "wrong", trust)
        with pytest.raises(ConnectionError, match="certificate"):
            send(secure.port, "s3cret/:@%", None)
        with pytest.raises(ConnectionError, match="no TLS"):
            send(mailbox.port, "s3cret/:@%", None)
        assert mailbox.got == []
    finally:
        secure.close()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mailto:team@example.net", "no e-mail is sent to example.net"),
        ("mailto:team@example.com?cc=all@example.com", "not an e-mail address"),
        ("mailto:a@example.com,b@example.com", "not an e-mail address"),
        ("mailto:team@example.com%0d%0aBcc:x@example.com", "not an e-mail address"),
    ],
)
def test_mail_goes_only_to_one_address_of_an_allowed_domain(world: World, url: str, why: str) -> None:
    with pytest.raises(NightpressError, match=why) as refused:
        add(world, url, kind="email")
    assert refused.value.code is ErrorCode.URL_NOT_ALLOWED
    hook = add(world, "mailto:team@example.com", kind="email")
    with pytest.raises(NightpressError, match=why):
        world.store.edit(TENANT, hook, WebhookUpdate(url=url))


def test_without_a_mail_server_no_mailbox_can_be_told(tmp_path: Path, sqlite_url: str) -> None:
    plain = World(tmp_path, sqlite_url)
    with pytest.raises(NightpressError, match="sends no e-mail"):
        add(plain, "mailto:team@example.com", kind="email")
    plain.engine.dispose()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kind": "email"}, "belong together"),
        ({"url": "mailto:team@example.com"}, "belong together"),
        ({"kind": "slack", "template": "$modell"}, "names \\$modell"),
        ({"kind": "slack", "template": "100$"}, "without a field"),
        ({"template": "$model"}, "is JSON"),
    ],
)
def test_a_webhook_that_makes_no_sense_is_refused(fields: dict[str, str], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        WebhookCreate.model_validate({"url": "https://example.com/", "events": ["job.failed"], **fields})


@pytest.mark.slow
def test_a_study_and_its_winner_are_told(tmp_path: Path, sqlite_url: str, bert_tiny: Path) -> None:
    studies = StudyWorld(tmp_path, sqlite_url, bert_tiny)
    store = studies.resources.webhooks
    wanted = WebhookCreate(url="https://127.0.0.1/", events=["study.succeeded", "model.promoted"])
    with pytest.raises(NightpressError):
        store.create(TENANT, wanted)
    settings = studies.settings.model_validate(studies.settings.model_dump() | {"webhook_networks": ["127.0.0.0/8"]})
    store = WebhookStore(studies.engine, open_keeper(settings), settings)
    hook = store.create(TENANT, wanted).webhook.id
    study = studies.run(studies.create())
    told = {
        delivery.event: delivery.payload["data"] for delivery in store.deliveries(TENANT, hook, cursor=None, limit=9)[0]
    }
    assert told["study.succeeded"]["id"] == study.id
    assert told["study.succeeded"]["verdict"] == study.verdict == "accepted"
    assert told["model.promoted"]["job_id"] == told["study.succeeded"]["job_id"]
    text = message_of({"type": "study.succeeded", "data": told["study.succeeded"]}, template=None, public_url=PAGE).text
    assert text.splitlines()[0] == "✓ Study tiny: succeeded, accepted"
    assert text.splitlines()[-1] == f"{PAGE}#/studies/{study.id}"
    studies.engine.dispose()


def test_runs_of_a_schedule_that_failed_or_were_skipped_are_told(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path
) -> None:
    world = ScheduleWorld(tmp_path, sqlite_url, bert_tiny, webhook_networks=["127.0.0.0/8"])
    store = WebhookStore(world.engine, open_keeper(world.settings), world.settings)
    wanted = WebhookCreate(url="https://127.0.0.1/", events=["schedule.failed", "schedule.skipped"])
    hook = store.create(TENANT, wanted).webhook.id
    made = world.schedule("2026-11-23T02:00", catch_up="none")
    world.tick("2026-11-23T02:30")  # half an hour late: missed
    world.models.delete(TENANT, "tiny")
    world.tick("2026-11-23T03:00")
    world.tick("2026-11-23T03:00")
    told = [(sent.event, sent.payload["data"]) for sent in store.deliveries(TENANT, hook, cursor=None, limit=9)[0]]
    by_event = dict(told)
    assert len(told) == 2, "each run is told once"
    assert by_event["schedule.skipped"]["reason"] == "missed"
    assert by_event["schedule.failed"]["error"]["code"] == "not_found"
    assert {data["id"] for _, data in told} == {made.id}
    assert {data["scheduled_for"][11:16] for _, data in told} == {"02:00", "03:00"}
    text = message_of(
        {"type": "schedule.failed", "data": by_event["schedule.failed"]}, template=None, public_url=""
    ).text
    assert text.splitlines()[0] == "✗ Schedule nightly: failed"
    world.engine.dispose()


def test_every_field_of_a_template_is_filled_in() -> None:
    error = {"code": "out_of_memory", "message": "It needs 9 GB.", "hint": "Use another worker."}
    data = {"id": "job_1", "name": "night", "model_name": "tiny", "recipe": "int4", "state": "failed", "error": error}
    data |= {"verdict": "rejected", "reason": "overlap"}
    template = "|".join(f"${name}" for name in TEMPLATE_FIELDS)
    told = message_of({"type": "job.failed", "data": data}, template=template, public_url=PAGE)
    filled = "job.failed|job_1|night|tiny|int4|failed|rejected|overlap|It needs 9 GB. Use another worker.|job_1"
    assert told.text == f"{filled}|{PAGE}#/jobs/job_1"


def test_a_name_cannot_forge_the_head_of_a_mail(world: World, mailbox: MailServer) -> None:
    hook = add(world, "mailto:team@example.com", "job.failed", kind="email", template="$name")
    with transaction(world.engine) as connection:
        note_event(connection, TENANT, "job.failed", {"id": "job_1", "name": "x\r\nBcc: all@example.com\r\n\r\nspam"})
    world.try_all()
    [mail] = mailbox.got
    assert mail["Bcc"] is None
    assert mail["Subject"] == "x"
    assert mailbox.recipients == ["team@example.com"]
    assert last(world, hook).state == "delivered"
