"""What attempts, jobs, studies, schedules and tenants cost, and budgets in money."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, delete, func, select, update

from nightpress import migrations
from nightpress.core.database import db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.placement import Queue
from nightpress.core.service.access.quotas import QuotaBook
from nightpress.core.service.costs.ledger import CostLedger
from nightpress.core.service.costs.prices import MICROS, PriceList
from nightpress.core.service.jobs.records import Claimed, Worker, WorkerOffer
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.costs import spending
from nightpress.core.service.tables.jobs import job_attempts, workers
from nightpress.core.service.tables.schedules import schedule_runs
from nightpress.core.settings import Settings
from nightpress.core.wire.access import QuotaChange
from nightpress.core.wire.jobs import JobCreate
from tests.api import serve
from tests.command import run
from tests.face import Face, make_report
from tests.jobs import gpus, submit, succeeded
from tests.racing import all_at_once
from tests.studies import SPACE, TENANT, StudyWorld

PRICES = {"cpu": 3.6, "gpu": 36.0, "gpu:H200": 72.0}  # 0.001, 0.01 and 0.02 a second


@pytest.fixture
def ledger(engine: Engine) -> CostLedger:
    return CostLedger(engine, PriceList(PRICES, "EUR"))


def take(store: JobStore, queue: Queue = "cpu", device: str = "cpu", worker: str = "w") -> Claimed:
    store.roster.heartbeat_worker(Worker(worker, "host", queue, device, 1 << 40, 1, "1"))
    claimed = store.claims.claim(WorkerOffer(worker, queue, device, 1 << 40, 1, gpus(4, name=device)), ttl_s=600)
    assert claimed is not None
    return claimed


def began(engine: Engine, claimed: Claimed, seconds: float) -> None:
    """Let an attempt have begun so many seconds ago."""
    with transaction(engine) as connection:
        this = (job_attempts.c.job_id == claimed.job.id, job_attempts.c.number == claimed.lease.attempt)
        connection.execute(update(job_attempts).where(*this).values(started_at=db_now(-seconds)))


def test_every_attempt_costs_by_its_queue_and_gpu_and_is_counted_once(
    engine: Engine, store: JobStore, ledger: CostLedger
):
    job_id = submit(store)
    first = take(store)
    began(engine, first, 100)
    fault = NightpressError(ErrorCode.OUT_OF_MEMORY, "x")
    assert store.attempts.fail(first.lease, fault, backoff_s=0) == "requeued"
    second = take(store)
    began(engine, second, 50)
    assert store.attempts.finish(second.lease, succeeded(second.lease))
    plain, special = submit(store, queue="gpu"), submit(store, queue="gpu", needs_gpus=3)
    for device, worker in (("NVIDIA L4", "g1"), ("NVIDIA H200", "g2")):
        claimed = take(store, "gpu", device, worker)
        began(engine, claimed, 10)
        assert store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    running = submit(store, tenant_id="other")
    began(engine, take(store), 1000)

    def costs() -> list[float]:
        found = ledger.of_jobs([job_id, plain, special, running])
        assert found is not None
        return [round(found[name], 2) for name in (job_id, plain, special, running)]

    assert costs() == pytest.approx([0.15, 0.1, 0.6, 1.0], abs=0.1)
    assert sum(all_at_once(engine, select(job_attempts), CostLedger(engine, ledger.prices).count_ended)) == 4
    assert ledger.count_ended() == 0
    with transaction(engine) as connection:
        connection.execute(delete(workers))
    assert [(cost.gpus, cost.device) for cost in ledger.attempts(special)] == [(3, "NVIDIA H200")], "without its worker"
    with transaction(engine, read_only=True) as connection:
        rows = connection.execute(select(spending.c.tenant_id, func.sum(spending.c.micros)).group_by("tenant_id")).all()
    assert [tuple(row) for row in rows] == [("default", pytest.approx(850_000, abs=150_000))]
    assert costs() == pytest.approx([0.15, 0.1, 0.6, 1.0], abs=0.1)
    spent = ledger.spent("default")
    assert spent.day == spent.month == rows[0][1]
    assert ledger.spent("other").day == pytest.approx(1_000_000, abs=20_000), "an attempt that runs costs, too"
    assert ledger.spent_by_all().month == rows[0][1]
    dearer = CostLedger(engine, PriceList({"cpu": 3600.0, "gpu": 3600.0}, "EUR"))
    later = dearer.of_jobs([job_id, plain])
    assert later is not None
    assert [round(later[name], 2) for name in (job_id, plain)] == costs()[:2], "what was counted keeps its price"
    assert CostLedger(engine, PriceList({}, "")).of_jobs([job_id]) is None


def test_budgets_refuse_submissions_and_hold_back_what_is_queued(engine: Engine, store: JobStore, ledger: CostLedger):
    settings = Settings(_env_file=None, prices=PRICES, max_cost_month=5)
    book = QuotaBook(engine, settings)
    book.change("default", QuotaChange(max_cost_day=1))
    for _ in range(2):
        submit(store)
    book.check_budget("default")
    claimed = take(store)
    began(engine, claimed, 1200)
    with pytest.raises(NightpressError, match=r"The budget of 1 EUR for today is spent: 1\.2.") as refused:
        book.check_budget("default")
    assert refused.value.code is ErrorCode.QUOTA_EXCEEDED
    assert "tomorrow" in refused.value.hint
    assert store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    ledger.count_ended()
    cpu = WorkerOffer("w", "cpu", "cpu", 1 << 40, 1)
    assert store.claims.claim(cpu, ttl_s=60) is None, "what is queued waits for the next day"
    submit(store, tenant_id="other")
    other = store.claims.claim(cpu, ttl_s=60)
    assert other is not None
    assert other.job.tenant_id == "other"
    with transaction(engine) as connection:  # tomorrow, in the same month or the next
        connection.execute(update(spending).values(day="2020-01-01"))
    book.check_budget("default")
    assert store.claims.claim(cpu, ttl_s=60) is not None
    with transaction(engine) as connection:
        connection.execute(update(spending).values(day=_this_month(engine), micros=5 * MICROS))
    with pytest.raises(NightpressError, match="The budget of 5 EUR for this month is spent"):
        book.check_budget("default")
    usage = book.usage("default")
    assert (usage.currency, usage.cost_month >= 5, usage.cost_month - usage.cost_day) == ("EUR", True, pytest.approx(5))


def _this_month(engine: Engine) -> str:
    """Another day of this month than today."""
    with transaction(engine, read_only=True) as connection:
        now = connection.execute(select(db_now())).scalar_one()
    return f"{now:%Y-%m}-{'02' if now.day == 1 else '01'}"


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, bert_tiny: Path) -> Iterator[StudyWorld]:
    world = StudyWorld(tmp_path, sqlite_url, bert_tiny, prices=PRICES, max_cost_month=100)
    yield world
    world.engine.dispose()


@pytest.mark.slow
def test_a_study_ends_its_search_when_its_money_is_spent_and_begins_nothing_without_a_budget(world: StudyWorld):
    study = world.create(trials=40, parallel=2, max_cost=2.5)
    control = world.replica()
    world.fill(control)
    world.claim_all()
    for claimed in world.held:
        began(world.engine, claimed, 1000)
    world.end(world.held[0])
    control.advance()
    assert world.get(study).cost.amount == pytest.approx(1.0, abs=0.01)  # type: ignore[union-attr]
    assert world.get(study).state == "searching", "1 for the trial that has ended and 1 for the one that runs"
    world.claim_all()
    for claimed in world.held:
        began(world.engine, claimed, 1000)
    control.advance()
    for claimed in list(world.held):
        world.held.remove(claimed)
        assert world.store.attempts.confirm_cancelled(claimed.lease)
    control.advance()
    assert (world.get(study).state, world.get(study).reason) == ("judging", "cost")
    ended = world.run(study)
    assert ended.cost is not None
    assert (ended.max_cost, ended.cost.currency, ended.cost.amount) == (2.5, "EUR", pytest.approx(3.0, abs=0.1))

    while world.resources.costs.count_ended():
        pass
    world.resources.quotas.change(TENANT, QuotaChange(max_cost_month=2))
    poor = world.create(trials=2, parallel=1, space=[{**SPACE[0], "seed": 9}])
    control.advance()
    assert world.get(poor).proposed == 0, "it waits for money"
    with pytest.raises(NightpressError, match="budget of 2 EUR"):
        world.resources.jobs.submit(TENANT, JobCreate(model="tiny", recipe="int8-encoder"))
    world.resources.quotas.change(TENANT, QuotaChange(max_cost_month=50))
    control.advance()
    assert world.get(poor).proposed == 1


def test_a_study_can_not_be_bounded_in_money_without_prices(tmp_path: Path, sqlite_url: str, bert_tiny: Path):
    world = StudyWorld(tmp_path, sqlite_url, bert_tiny)
    with pytest.raises(NightpressError, match="set no prices"):
        world.create(max_cost=1.0)
    assert world.create().cost is None
    world.engine.dispose()


@pytest.mark.slow
def test_a_job_a_schedule_and_a_tenant_show_what_they_cost_over_http_and_on_the_command_line(
    tmp_path: Path, bert_tiny: Path
):
    settings = Settings(
        _env_file=None,
        data_dir=tmp_path / "np",
        broker_url="redis://127.0.0.1:1/0",
        model_roots=[bert_tiny.parent],
        prices=PRICES,
        currency="CHF",
    )
    migrations.upgrade(settings.sql_url)
    with serve(settings) as api, api.client(scopes=["admin"]) as client:
        resources = api.services.resources
        client.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)})
        nightly = {"name": "nightly", "cron": "0 2 * * *", "job": {"model": "tiny", "recipe": "int8-encoder"}}
        schedule = client.post("/v1/schedules", json=nightly).json()["id"]
        job = client.post("/v1/jobs", json={"model": "tiny", "recipe": "int8-encoder"}).json()
        assert job["cost"] == {"amount": 0.0, "currency": "CHF"}
        claimed = api.claim()
        began(resources.engine, claimed, 1000)
        outcome = api.ship(claimed, {"model.onnx": b"x"})
        report = make_report(job["id"], "accepted").model_dump(mode="json")
        assert resources.store.attempts.finish(claimed.lease, type(outcome)("accepted", outcome.manifest, report))
        resources.costs.count_ended()
        with transaction(resources.engine) as connection:
            row = {"id": "run_1", "schedule_id": schedule, "cause": "cron", "state": "submitted", "job_id": job["id"]}
            connection.execute(schedule_runs.insert().values(scheduled_for=db_now(), created_at=db_now(), **row))
        near = pytest.approx(1.0, abs=0.05)
        assert client.get(f"/v1/jobs/{job['id']}").json()["cost"] == {"amount": near, "currency": "CHF"}
        assert client.get("/v1/jobs").json()["items"][0]["cost"]["amount"] == near
        assert client.get("/v1/schedules/nightly").json()["cost"] == {"amount": near, "currency": "CHF"}
        assert client.get("/v1/schedules").json()["items"][0]["cost"]["amount"] == near
        usage = client.get("/v1/me").json()["usage"]
        assert (usage["cost_day"], usage["cost_month"], usage["currency"]) == (near, near, "CHF")
        whole = client.get(f"/v1/jobs/{job['id']}/cost").json()
        assert [attempt["amount"] for attempt in whole["attempts"]] == [near]
        assert [saving["artifact"] for saving in whole["savings"]] == ["compressed-tensors"]
        (today,) = client.get("/v1/costs").json()["days"]
        assert today["amount"] == near
        with transaction(resources.engine) as connection:
            old = {"tenant_id": "default", "day": "2020-02-03", "micros": 7_000_000}
            connection.execute(spending.insert().values(old))
        assert client.get("/v1/costs").json() == {"currency": "CHF", "days": [today]}
        whole_past = client.get("/v1/costs", params={"days": 3660}).json()["days"]
        assert whole_past == [today, {"day": "2020-02-03", "amount": 7.0}]
        assert client.get("/v1/costs", params={"tenant_id": "other"}).json()["days"] == []
        with api.client(tenant_id="other", scopes=["jobs:read"]) as other:
            assert other.get("/v1/costs").json()["days"] == []
            assert other.get("/v1/costs", params={"tenant_id": "default"}).status_code == 403
        metrics = client.get("/metrics").text
        assert 'nightpress_spent{period="month"} 1.0' in metrics
        changed = client.patch("/v1/admin/tenants/default", json={"max_cost_day": 1}).json()
        assert (changed["own"]["max_cost_day"], changed["quotas"]["max_cost_day"]) == (1, 1)
        refused = client.post("/v1/jobs", json={"model": "tiny", "recipe": "int8-encoder"})
        assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
        assert "budget of 1 CHF for today" in refused.json()["detail"]

        face = Face(tmp_path / "user")
        key = {"NIGHTPRESS_API_KEY": api.key(scopes=["admin"])}
        shown = run(face, "cost", job["id"], "--api", api.url, **key)
        assert "CHF for a million tokens" in shown.stdout, shown.stderr
        assert "never" in shown.stdout
        told = json.loads(run(face, "cost", job["id"], "--api", api.url, "--json", **key).stdout)
        assert told["amount"] == near
        assert "8.00 CHF in all" in run(face, "cost", "--days", "3660", "--api", api.url, **key).stdout
        for command in (
            ["inspect", job["id"]],
            ["schedule", "show", "nightly"],
            ["tenants", "show", "default"],
            ["whoami"],
        ):
            assert "1.00 CHF" in run(face, *command, "--api", api.url, **key).stdout, command
