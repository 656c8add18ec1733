"""Every column of the tables from which others are told: webhooks, promotions and trackers."""

from pathlib import Path

from sqlalchemy import Engine

from nightpress.core.database import db_now, transaction
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.promotions.store import PromotionStore
from nightpress.core.service.tables.promotions import promotions
from nightpress.core.service.tables.trackers import tracked_runs, trackers
from nightpress.core.service.tables.webhooks import webhook_attempts, webhook_deliveries, webhooks
from nightpress.core.service.trackers.store import TrackerStore
from nightpress.core.service.webhooks.signing import open_keeper
from nightpress.core.service.webhooks.store import WebhookStore
from nightpress.core.settings import Settings
from nightpress.core.wire.webhooks import WebhookCreate
from tests.columns import MAPPING, WORDS, Rows, identifier
from tests.jobs import claim, submit, succeeded

COVERED = {tracked_runs, trackers, webhook_attempts, webhook_deliveries, webhooks}


def test_webhooks_and_what_they_deliver(engine: Engine, rows: Rows, tmp_path: Path) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path)
    hooks = WebhookStore(engine, open_keeper(settings), settings)
    wanted = WebhookCreate(url="https://93.184.215.14/", events=["job.failed"])
    hook = hooks.create("tenant-a", wanted, key_id="key12345").webhook.id
    row = {
        "id": hook,
        "tenant_id": "tenant-a",
        "url": "https://93.184.215.14/",
        "kind": "standard",
        "template": "",
        "events": ["job.failed"],
        "generation": 1,
        "previous_until": None,
        "enabled": True,
        "disabled_reason": None,
        "version": 1,
        "created_by": "key12345",
        "created_at": rows.now,
    }
    counters = frozenset({"generation", "version"})
    rows.check(webhooks, row, alike=counters)
    channel = WebhookCreate(url="https://93.184.215.15/", events=["job.failed"], kind="slack", template="$model")
    other = hooks.create("tenant-a", channel, key_id="key12345").webhook.id
    told = {"id": other, "url": "https://93.184.215.15/", "kind": "slack", "template": "$model"}
    rows.check(webhooks, {**row, **told}, webhooks.c.id == other, alike=counters)
    hooks.delete("tenant-a", other)
    hooks.rotate("tenant-a", hook, overlap_s=3600)
    hooks.test("tenant-a", hook)
    delivery = {
        "id": identifier("msg"),
        "webhook_id": hook,
        "event": "webhook.test",
        "payload": MAPPING,
        "state": "pending",
        "attempts": 0,
        "next_at": rows.now,
        "created_at": rows.now,
    }
    rows.check(webhook_deliveries, delivery)
    [due] = hooks.take_due(hooks.now())
    rows.check(webhook_deliveries, {**delivery, "attempts": 1, "next_at": rows.after(60)})
    tried = {"status": 410, "error": "Gone", "duration_ms": 21}
    hooks.settle(due, state="failed", next_at=None, attempt=tried, gone=True)
    rows.check(webhook_deliveries, {**delivery, "state": "failed", "attempts": 1, "next_at": None})
    rows.check(webhook_attempts, {**tried, "delivery_id": due.id, "number": 1, "at": rows.now})
    ended = {"generation": 2, "previous_until": rows.after(3600), "enabled": False, "disabled_reason": WORDS}
    rows.check(webhooks, {**row, **ended, "version": 3})
    rows.all_seen(webhooks, webhook_deliveries, webhook_attempts)


def test_a_promotion_by_hand(engine: Engine, rows: Rows, store: JobStore) -> None:
    submit(store, tenant_id="tenant-a", model_name="name-of-the-model", promote=False)
    claimed = claim(store)
    assert store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    PromotionStore(engine).promote("tenant-a", "name-of-the-model", claimed.job.id, key_id="key12345")
    row = {
        "id": identifier("prm"),
        "tenant_id": "tenant-a",
        "model_name": "name-of-the-model",
        "job_id": claimed.job.id,
        "cause": "manual",
        "created_by": "key12345",
        "created_at": rows.now,
    }
    rows.check(promotions, row)
    rows.all_seen(promotions)


def test_trackers_and_what_they_were_told(engine: Engine, rows: Rows, store: JobStore) -> None:
    outbox = TrackerStore(engine)
    outbox.use({"mlflow": "http://mlflow:5000"})
    rows.check(trackers, {"name": "mlflow", "url": "http://mlflow:5000", "since": rows.now})
    job_id = submit(store)
    claimed = claim(store)
    assert store.attempts.record_event(claimed.lease, "checkpoint", {})
    row = {
        "tracker": "mlflow",
        "subject": job_id,
        "changed": 1,
        "told": 0,
        "lines": 0,
        "run_id": None,
        "page": None,
        "attempts": 0,
        "next_at": rows.now,
        "error": None,
        "created_at": rows.now,
    }
    counters = frozenset({"changed", "told", "lines", "attempts"})
    rows.check(tracked_runs, row, alike=counters)
    [due] = outbox.take_due("mlflow", limit=5)
    assert outbox.begun(due, "run-7", "http://mlflow:5000/#/run-7")
    assert store.attempts.record_event(claimed.lease, "checkpoint", {})
    begun = {**row, "changed": 2, "run_id": "run-7", "page": "http://mlflow:5000/#/run-7"}
    rows.check(tracked_runs, {**begun, "attempts": 1, "next_at": rows.after(120)}, alike=counters)
    assert outbox.failed(due, "it answered 503")
    rows.check(
        tracked_runs, {**begun, "attempts": 1, "next_at": rows.after(2), "error": "it answered 503"}, alike=counters
    )
    assert not outbox.told(due, lines=9, again_s=None), "the row is no longer held"
    with transaction(engine) as connection:
        connection.execute(tracked_runs.update().values(next_at=db_now(-1)))
    [due] = outbox.take_due("mlflow", limit=5)
    assert outbox.told(due, lines=9, again_s=30)
    rows.check(tracked_runs, {**begun, "told": 2, "lines": 9, "next_at": rows.after(30)}, alike=counters)
    rows.all_seen(trackers, tracked_runs)
