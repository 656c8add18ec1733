"""Hosts with different clocks: the database's time decides what is newer and what has expired."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

import nightpress.core.ids
from nightpress.core.artifacts.local import LocalStore
from nightpress.core.artifacts.open import open_store
from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.database import db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.audit import AuditLog
from nightpress.core.service.access.issuing import KeyIssuer
from nightpress.core.service.access.keys import ALL_SCOPES, Principal, create_key
from nightpress.core.service.jobs.records import Claimed
from nightpress.core.service.jobs.retention import JobRetention
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.promotions.store import PromotionStore
from nightpress.core.service.registry.datasets import DataSetRegistry
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.registry.registry import Registry
from nightpress.core.service.schedules.store import ScheduleStore
from nightpress.core.service.tables.access import audit_log
from nightpress.core.service.tables.promotions import promotions
from nightpress.core.service.tables.registry import data_sets, models
from nightpress.core.service.webhooks.signing import open_keeper
from nightpress.core.service.webhooks.store import WebhookStore
from nightpress.core.settings import Settings
from nightpress.core.wire.access import KeyCreate
from nightpress.core.wire.models import DataSetCreate, ModelCreate
from nightpress.core.wire.webhooks import WebhookCreate
from tests.jobs import add_model, age, claim, submit, succeeded

TENANT = "default"
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


class Host:
    """Runs code as on a host whose clock is ahead of the others. Identifiers made there contain the wrong time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    @contextmanager
    def ahead(self, seconds: float) -> Iterator[None]:
        real_ns, real = time.time_ns, time.time
        with self._monkeypatch.context() as patched:
            patched.setattr(nightpress.core.ids, "_last", 0)  # as in another process
            patched.setattr(time, "time_ns", lambda: real_ns() + int(seconds * 1e9))
            patched.setattr(time, "time", lambda: real() + seconds)
            yield
        nightpress.core.ids._last = 0


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


@pytest.fixture
def settings(tmp_path: Path, sql_url: str) -> Settings:
    (tmp_path / "roots").mkdir()
    given: dict[str, Any] = {
        "data_dir": tmp_path / "home",
        "model_roots": [tmp_path / "roots"],
        "database_url": sql_url,
    }
    made = Settings(_env_file=None, **given)
    made.data_dir.mkdir()
    return made


def finish_next(store: JobStore) -> str:
    claimed = claim(store)
    assert store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    return claimed.job.id


def apart() -> None:
    """Wait until the database's time has changed: SQLite's clock counts milliseconds."""
    time.sleep(0.002)


# A model name's latest -----------------------------------------------------------------------------------------------


def test_a_worker_ahead_of_its_time_does_not_hold_the_pointer(engine: Engine, host: Host) -> None:
    add_model(engine)
    store, pointers = JobStore(engine), PromotionStore(engine)
    submit(store)
    first = finish_next(store)
    submit(store)
    with host.ahead(HOUR_S):
        second = finish_next(store)
    assert pointers.latest(TENANT, "tiny").job_id == second
    assert pointers.promote(TENANT, "tiny", first, key_id=None).job_id == first
    assert pointers.latest(TENANT, "tiny").job_id == first
    submit(store)
    third = finish_next(store)
    assert pointers.latest(TENANT, "tiny").job_id == third
    listed = [item.job_id for item in pointers.page(TENANT, "tiny", cursor=None, limit=10)[0]]
    assert listed == [third, first, second, first]


def test_a_job_submitted_by_a_host_ahead_is_no_newer_for_it(engine: Engine, host: Host) -> None:
    """If an older job ends later, the model's name still points to the newer job, whatever the times in their identifiers."""
    add_model(engine)
    store, pointers = JobStore(engine), PromotionStore(engine)
    with host.ahead(HOUR_S):
        older = submit(store)
    apart()
    newer = submit(store, priority=1)
    assert finish_next(store) == newer
    assert finish_next(store) == older
    assert pointers.latest(TENANT, "tiny").job_id == newer


@pytest.mark.slow
def test_of_two_jobs_that_end_at_the_same_moment_the_later_one_holds_the_name(engine: Engine) -> None:
    add_model(engine)
    store, pointers = JobStore(engine), PromotionStore(engine)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(15):
            older = submit(store)
            apart()
            newer = submit(store)
            start = threading.Barrier(2)

            def finish(claimed: Claimed, start: threading.Barrier = start) -> None:
                start.wait()
                assert store.attempts.finish(claimed.lease, succeeded(claimed.lease))

            both = [claim(store), claim(store)]
            assert [claimed.job.id for claimed in both] == [older, newer]
            list(pool.map(finish, both))
            assert pointers.latest(TENANT, "tiny").job_id == newer


def test_a_database_whose_clock_was_set_back_still_orders_promotions(engine: Engine) -> None:
    add_model(engine)
    store, pointers = JobStore(engine), PromotionStore(engine)
    submit(store)
    first = finish_next(store)
    with transaction(engine) as connection:
        connection.execute(update(promotions).values(created_at=db_now(HOUR_S)))
    submit(store)
    second = finish_next(store)
    assert pointers.latest(TENANT, "tiny").job_id == second
    pointers.promote(TENANT, "tiny", first, key_id=None)
    assert pointers.latest(TENANT, "tiny").job_id == first


def test_retention_keeps_what_the_pointer_stands_on(engine: Engine, host: Host, tmp_path: Path) -> None:
    add_model(engine)
    store, pointers = JobStore(engine), PromotionStore(engine)
    submit(store)
    with host.ahead(HOUR_S):
        earlier = finish_next(store)
    submit(store)
    latest = finish_next(store)
    for job_id in (earlier, latest):
        age(engine, job_id, 40 * DAY_S, "finished_at")
    JobRetention(engine, LocalStore(tmp_path / "objects")).prune_jobs(30 * DAY_S)
    assert store.reader.get(TENANT, earlier) is None
    assert store.reader.get(TENANT, latest) is not None
    assert pointers.latest(TENANT, "tiny").job_id == latest


# What a name refers to -----------------------------------------------------------------------------------------------


def bring_model(registry: Registry[Any], folder: Path, content: str) -> str:
    (folder / "README.md").write_text(content)
    return str(registry.create(TENANT, ModelCreate(name="tiny", path=str(folder))).id)  # type: ignore[attr-defined]


def bring_data(registry: Registry[Any], folder: Path, content: str) -> str:
    (folder / "lines.txt").write_text(content)
    path = str(folder / "lines.txt")
    return str(registry.create(TENANT, DataSetCreate(name="tiny", path=path)).id)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "bring"), [(ModelRegistry, bring_model), (DataSetRegistry, bring_data)])
def test_a_name_means_what_was_brought_last(
    engine: Engine, settings: Settings, host: Host, bert_tiny: Path, kind: Any, bring: Callable[..., str]
) -> None:
    folder = settings.model_roots[0] / "tiny"
    folder.mkdir()
    for file in bert_tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    registry = kind(engine, open_store(settings), settings)
    with host.ahead(HOUR_S):
        first = bring(registry, folder, "yesterday's")
    apart()
    second = bring(registry, folder, "today's")
    assert registry.get(TENANT, "tiny").id == second
    listed = [item.id for item in registry.page(TENANT, cursor=None, limit=10)[0] if item.id in {first, second}]
    assert listed == [second, first]
    table = models if kind is ModelRegistry else data_sets
    with transaction(engine) as connection:
        connection.execute(update(table).where(table.c.id == second).values(created_at=db_now(HOUR_S)))
    third = bring(registry, folder, "the database's clock was set back")
    assert registry.get(TENANT, "tiny").id == third


def test_what_was_fetched_before_is_what_goes(engine: Engine, settings: Settings, host: Host) -> None:
    """If two models were fetched under one name, the newer one stays."""
    hub = settings.model_copy(update={"hub_organisations": ["acme"]})
    registry = ModelRegistry(engine, open_store(hub), hub)
    with host.ahead(HOUR_S):
        first = registry.fetch(TENANT, "tiny", "hf://acme/tiny", "a" * 40).id
    apart()
    second = registry.fetch(TENANT, "tiny", "hf://acme/tiny", "b" * 40).id
    url = str(registry.get(TENANT, second).source_url)
    again = registry.fetched(TENANT, "tiny", url, "b" * 40)
    assert again is not None
    assert again.id == second
    ready = {"state": "ready", "digest": "sha256:" + "1" * 64, "parameters": 1}
    with transaction(engine) as connection:
        connection.execute(update(models).values(ready))
    assert registry.forget_superseded(-HOUR_S) == 1
    assert [item.id for item in registry.page(TENANT)[0]] == [second] != [first]


# Lists ---------------------------------------------------------------------------------------------------------------


def administrator_of(engine: Engine) -> Principal:
    """An administrator with a key in the database."""
    key, _ = create_key(engine, tenant_id=TENANT, name="administrator", scopes=ALL_SCOPES)
    return Principal(TENANT, key.id, ALL_SCOPES, key.id)


def lists(engine: Engine, settings: Settings) -> dict[str, tuple[Callable[[int], str], Callable[..., Any]]]:
    """List → (function that adds the n-th item and returns its id, function that reads a page)."""
    schedules, audit = ScheduleStore(engine), AuditLog(engine)
    hooks, issuer = WebhookStore(engine, open_keeper(settings), settings), KeyIssuer(engine)
    administrator = administrator_of(engine)
    hook = hooks.create(TENANT, WebhookCreate(url="https://93.184.215.14/", events=["job.failed"])).webhook.id
    cron: dict[str, Any] = {"cron": "0 2 * * *", "timezone": "UTC", "overlap": "skip", "catch_up": "latest"}
    rest: dict[str, Any] = {"only_if_changed": False, "suspended": False, "job": {"model": "m", "recipe": "auto"}}
    fired = schedules.create(TENANT, {**cron, **rest, "name": "fired"}, key_id=None).id

    def note(index: int) -> str:
        line = {"key_id": "key12345", "action": "POST /", "subject": f"/{index}", "status": 200, "request_id": "r"}
        audit.note(tenant_id=TENANT, **line)
        with transaction(engine, read_only=True) as connection:
            return str(
                connection.execute(select(audit_log.c.id).where(audit_log.c.subject == f"/{index}")).scalar_one()
            )

    return {
        "schedules": (
            lambda index: schedules.create(TENANT, {**cron, **rest, "name": f"s{index}"}, key_id=None).id,
            lambda **page: schedules.page(TENANT, **page),
        ),
        "runs": (
            lambda _: schedules.trigger(TENANT, fired).id,
            lambda **page: schedules.runs(TENANT, fired, **page),
        ),
        "webhooks": (
            lambda _: (
                hooks.create(TENANT, WebhookCreate(url="https://93.184.215.14/", events=["job.failed"])).webhook.id
            ),
            lambda **page: hooks.page(TENANT, **page),
        ),
        "deliveries": (
            lambda _: hooks.test(TENANT, hook).id,
            lambda **page: hooks.deliveries(TENANT, hook, **page),
        ),
        "keys": (
            lambda index: issuer.create(administrator, KeyCreate(name=f"k{index}", scopes=["jobs:read"])).record.id,
            lambda **page: issuer.page(administrator, tenant_id=None, **page),
        ),
        "audit": (note, lambda **page: audit.page(tenant_id=None, **page)),
        "audit of a tenant": (note, lambda **page: audit.page(tenant_id=TENANT, **page)),
    }


@pytest.mark.parametrize("name", ["schedules", "runs", "webhooks", "deliveries", "keys", "audit", "audit of a tenant"])
def test_a_list_is_newest_first_whichever_host_wrote_a_line(
    engine: Engine, settings: Settings, host: Host, name: str
) -> None:
    add, page = lists(engine, settings)[name]
    added = []
    for index, ahead in enumerate((0.0, HOUR_S, -HOUR_S, 0.0, 2 * HOUR_S)):
        with host.ahead(ahead):
            added.append(add(index))
        apart()
    seen: list[str] = []
    cursor = None
    while True:
        items, cursor = page(cursor=cursor, limit=2)
        seen += [item.id for item in items]
        if cursor is None:
            break
    assert [line for line in seen if line in added] == added[::-1]
    for forged in (
        "",
        "x",
        added[0],
        "WzEsMl0",
        "WyIyMDI2LTAxLTAxIiwgImEiXQ",
        "W10",
        "WyIwMDAxLTAxLTAxVDAwOjAwKzIzOjAwIiwiYSJd",
    ):
        with pytest.raises(NightpressError) as refused:
            page(cursor=forged, limit=2)
        assert refused.value.code is ErrorCode.INVALID_REQUEST


# Expiry --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [-DAY_S, DAY_S])
def test_a_key_lasts_as_long_as_was_asked_for(engine: Engine, host: Host, ahead: float) -> None:
    issuer = KeyIssuer(engine)
    administrator = administrator_of(engine)
    with host.ahead(ahead):
        made = issuer.create(administrator, KeyCreate(name="k", scopes=["jobs:read"], expires_in_s=HOUR_S)).record
        assert made.expires_at is not None
        assert abs((made.expires_at - made.created_at).total_seconds() - HOUR_S) < 60
        assert not made.expired


def begin_upload(store: ObjectStore) -> str:
    return store.begin_upload("models/m/weights", sha256="a" * 64, signed_parts=False)


def test_an_upload_that_has_just_begun_is_not_swept_by_a_host_days_ahead(tmp_path: Path, host: Host) -> None:
    store = LocalStore(tmp_path / "objects")
    begin_upload(store)
    with host.ahead(3 * DAY_S):
        assert store.sweep_uploads(DAY_S) == 0
    assert store.sweep_uploads(-1.0) == 1, "it is swept when it is old by the store's own clock"
