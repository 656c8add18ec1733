"""Quotas, rate limits, keys' lives, the audit log and promotions, over HTTP on both databases."""

import datetime as dt
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, update
from sqlalchemy.exc import DBAPIError

from nightpress.core.database import make_engine, read_now, transaction
from nightpress.core.service.access.quotas import QuotaBook, add_gpu_time
from nightpress.core.service.jobs.claim_statements import Caps
from nightpress.core.service.jobs.queries import JobsWanted
from nightpress.core.service.jobs.records import Lease, WorkerOffer
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.access import audit_log
from nightpress.core.settings import Settings
from nightpress.core.wire.access import QuotaChange
from tests.api import RunningApi, serve
from tests.jobs import add_model, claim, host, submit, succeeded
from tests.servers import Valkey

JOB = {"model": "tiny", "recipe": "int8-encoder"}


@pytest.fixture
def api(tmp_path: Path, sql_url: str, bert_tiny: Path) -> Iterator[RunningApi]:
    settings = Settings(
        data_dir=tmp_path, database_url=sql_url, broker_url="redis://127.0.0.1:1/0", model_roots=[bert_tiny.parent]
    )
    with serve(settings) as running, running.client() as client:
        client.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)}).raise_for_status()
        yield running


@pytest.fixture
def client(api: RunningApi) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


@pytest.fixture
def admin(api: RunningApi) -> Iterator[httpx.Client]:
    with api.client(tenant_id="operator", scopes=["admin"]) as client:
        yield client


def bound(api: RunningApi, admin: httpx.Client, **quotas: int | None) -> None:
    admin.patch("/v1/admin/tenants/default", json=quotas).raise_for_status()


@pytest.mark.slow
def test_a_tenants_own_quotas_hold_and_are_shown(api: RunningApi, client: httpx.Client, admin: httpx.Client):
    first = admin.get("/v1/admin/tenants/default")
    assert (first.headers["etag"], first.json()["own"]["max_queued_jobs"]) == ('"v0"', None)
    bound(api, admin, max_queued_jobs=2)
    stale = admin.patch("/v1/admin/tenants/default", json={"max_queued_jobs": 9}, headers={"If-Match": '"v0"'})
    assert stale.json()["code"] == "precondition_failed"
    assert client.get("/v1/me").json()["quotas"]["max_queued_jobs"] == 2
    answers = [client.post("/v1/jobs", json=JOB) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201, 201, 429]
    assert answers[2].json()["code"] == "quota_exceeded"
    assert answers[2].headers["retry-after"]
    assert client.get("/v1/me").json()["usage"]["queued_jobs"] == 2
    assert {item["id"] for item in admin.get("/v1/admin/tenants").json()["items"]} == {"default", "operator"}
    for wrong in ({"max_queued_jobs": -1}, {"id": "x"}, {"max_queued_jobs": "many"}):
        assert admin.patch("/v1/admin/tenants/default", json=wrong).status_code == 422


@pytest.mark.slow
def test_storage_that_is_full_takes_no_model_and_no_job(api: RunningApi, client: httpx.Client, admin: httpx.Client):
    bound(api, admin, max_storage_bytes=1000)
    file = {"path": "reviews.txt", "size": 900, "sha256": "0" * 64}
    assert client.post("/v1/datasets", json={"name": "a", "file": file}).status_code == 201
    full = client.post("/v1/datasets", json={"name": "b", "file": file})
    assert (full.status_code, full.json()["code"], full.json()["used"]) == (429, "quota_exceeded", 900)
    assert client.post("/v1/jobs", json=JOB).status_code == 201
    bound(api, admin, max_storage_bytes=900)
    assert client.post("/v1/jobs", json=JOB).json()["code"] == "quota_exceeded"
    assert client.delete("/v1/datasets/a").status_code == 204
    assert client.post("/v1/jobs", json=JOB).status_code == 201


@pytest.mark.slow
def test_a_key_rotates_expires_and_ends(api: RunningApi, client: httpx.Client):
    def works(key: str) -> bool:
        api.services.resources.keys._known.clear()  # five seconds later the cache would have expired
        response = httpx.get(f"{api.url}/v1/me", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
        return response.status_code == 200

    made = client.post("/v1/keys", json={"name": "ci", "scopes": ["jobs:read"]}).json()
    assert works(made["key"])
    successor = client.post(f"/v1/keys/{made['record']['id']}/rotate", json={"overlap_s": 3600}).json()
    assert works(made["key"])
    assert works(successor["key"])
    assert successor["record"]["rotated_from"] == made["record"]["id"]
    last = client.post(f"/v1/keys/{successor['record']['id']}/rotate", json={"overlap_s": 0}).json()
    assert not works(successor["key"])
    assert client.post(f"/v1/keys/{successor['record']['id']}/rotate").json()["code"] == "conflict"
    assert client.delete(f"/v1/keys/{last['record']['id']}").status_code == 204
    assert not works(last["key"])
    assert client.get(f"/v1/keys/{last['record']['id']}").json()["revoked_at"]
    gone = {"name": "x", "scopes": ["jobs:read"], "expires_at": "2020-01-01T00:00:00Z"}
    assert client.post("/v1/keys", json=gone).status_code == 422


@pytest.mark.slow
def test_what_a_key_makes_stays_within_its_own_time_and_ends_with_it(api: RunningApi, client: httpx.Client):
    soon = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)).isoformat()
    later = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=2)).isoformat()
    scopes = ["jobs:read", "keys:read", "keys:write"]

    def made_with(key: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        wanted = {"name": "child", "scopes": scopes, **more}
        return httpx.post(f"{api.url}/v1/keys", json=wanted, headers=headers, trust_env=False)

    parent = client.post("/v1/keys", json={"name": "parent", "scopes": scopes, "expires_at": soon}).json()
    assert made_with(parent["key"], expires_at=later).json()["code"] == "forbidden"
    child = made_with(parent["key"]).json()
    assert child["record"]["expires_at"] == parent["record"]["expires_at"]
    assert child["record"]["made_by"] == parent["record"]["id"]
    successor = client.post(f"/v1/keys/{parent['record']['id']}/rotate", json={"overlap_s": 0}).json()
    grandchild = made_with(child["key"]).json()
    assert client.get(f"/v1/keys/{child['record']['id']}").json()["made_by"] == successor["record"]["id"]
    assert client.delete(f"/v1/keys/{successor['record']['id']}").status_code == 204
    api.services.resources.keys._known.clear()  # five seconds later the cache would have expired
    for ended in (child, grandchild):
        assert client.get(f"/v1/keys/{ended['record']['id']}").json()["revoked_at"]
        assert made_with(ended["key"]).status_code == 401
    assert client.get("/v1/me").status_code == 200


@pytest.mark.slow
def test_an_administrator_makes_keys_of_other_tenants_that_stand_by_themselves(api: RunningApi, admin: httpx.Client):
    theirs = {"name": "first", "scopes": ["jobs:read"], "tenant_id": "another"}
    assert admin.post("/v1/keys", json=theirs).json()["record"]["made_by"] is None
    another_administrator = {**theirs, "scopes": ["admin"]}
    own = admin.get("/v1/me").json()["key_id"]
    assert admin.post("/v1/keys", json=another_administrator).json()["record"]["made_by"] == own


@pytest.mark.slow
def test_the_audit_log_says_who_did_what_and_is_never_changed(
    api: RunningApi, client: httpx.Client, admin: httpx.Client
):
    key = client.get("/v1/me").json()["key_id"]
    client.get("/v1/jobs")
    client.post("/v1/keys", json={"name": "x", "scopes": ["nothing"]})
    made = client.post("/v1/keys", json={"name": "ci", "scopes": ["jobs:read"]}, headers={"X-Request-ID": "req-1"})
    revoked = f"/v1/keys/{made.json()['record']['id']}"
    client.delete(revoked)
    [second, first, *_] = admin.get("/v1/admin/audit", params={"tenant_id": "default"}).json()["items"]
    assert (first["action"], first["key_id"], first["request_id"]) == ("POST /v1/keys", key, "req-1")
    assert (second["action"], second["subject"]) == ("DELETE /v1/keys/{key_id}", revoked)
    for change in (update(audit_log).values(key_id="somebody"), delete(audit_log)):
        with pytest.raises(DBAPIError, match="append-only"), transaction(api.services.resources.engine) as connection:
            connection.execute(change)


def test_running_jobs_are_capped_in_the_claim_also_when_many_claim_at_once(sql_url: str):
    engine = make_engine(sql_url, pool_size=8)
    try:
        add_model(engine)
        store = JobStore(engine)
        QuotaBook(engine, Settings()).change("default", QuotaChange(max_running_jobs=2))
        for tenant in ("default", "other"):
            for _ in range(6):
                submit(store, tenant_id=tenant)
        claimed: list[str] = []

        def take(worker: int) -> None:
            offer = WorkerOffer(f"w{worker}", "cpu", "cpu", 1 << 40, 1)
            while (claim := store.claims.claim(offer, ttl_s=60)) is not None:
                claimed.append(claim.job.tenant_id)

        threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(claimed) == ["default"] * 2 + ["other"] * 6
        # When a job ends, another may run.
        lease = store.reader.page("default", JobsWanted(states=("running",)))[0][0]
        job = store.reader.get("default", lease.id)
        assert job is not None
        assert store.attempts.release(Lease(job.id, str(job.lease_id), job.attempt, str(job.worker_id)))
        assert claim(store, "w9").job.tenant_id == "default"
        everyone = JobStore(engine, Caps(running=6))
        assert everyone.claims.claim(WorkerOffer("w10", "cpu", "cpu", 1 << 40, 1), ttl_s=60) is None
    finally:
        engine.dispose()


def test_gpu_time_is_counted_when_an_attempt_ends_and_bounds_the_next(sql_url: str):
    engine = make_engine(sql_url)
    try:
        add_model(engine)
        store, book = JobStore(engine), QuotaBook(engine, Settings())
        gpu = host(count=2)
        for _ in range(2):
            submit(store, queue="gpu", needs_gpus=2)
        first = store.claims.claim(gpu, ttl_s=60)
        assert first is not None
        assert book.usage("default").running_gpus == 2
        assert store.attempts.finish(first.lease, succeeded(first.lease))
        assert 0 <= book.usage("default").gpu_seconds_month < 60
        with transaction(engine) as connection:
            add_gpu_time(connection, "default", read_now(connection) - dt.timedelta(minutes=30), 2)
        book.change("default", QuotaChange(max_gpu_seconds_month=3600))
        assert store.claims.claim(gpu, ttl_s=60) is None
        book.change("default", QuotaChange(max_gpu_seconds_month=4000))
        assert store.claims.claim(gpu, ttl_s=60) is not None
    finally:
        engine.dispose()


@pytest.mark.slow
def test_too_many_requests_a_minute_are_refused_and_a_dead_broker_lets_all_pass(
    tmp_path: Path, sqlite_url: str, valkey_server: Valkey
):
    for url, limited in ((valkey_server.url, True), ("redis://127.0.0.1:1/0", False)):
        settings = Settings(data_dir=tmp_path, database_url=sqlite_url, broker_url=url, rate_limit_per_minute=5)
        with serve(settings) as api, api.client() as client:
            answers = [client.get("/v1/jobs") for _ in range(7)]
            codes = [answer.status_code for answer in answers]
            assert codes == ([200] * 5 + [429] * 2 if limited else [200] * 7)
            if limited:
                assert answers[0].headers["ratelimit-limit"] == "5"
                assert [answer.headers["ratelimit-remaining"] for answer in answers[:5]] == ["4", "3", "2", "1", "0"]
                assert answers[5].json()["code"] == "rate_limited"
                assert 1 <= int(answers[5].headers["retry-after"]) <= 12
            with api.client() as another:
                assert another.get("/v1/jobs").status_code == 200


@pytest.mark.slow
def test_keys_that_a_key_makes_for_itself_pass_no_more_requests_than_it_may(
    tmp_path: Path, sqlite_url: str, valkey_server: Valkey
):
    url = valkey_server.url
    settings = Settings(data_dir=tmp_path, database_url=sqlite_url, broker_url=url, rate_limit_per_minute=8)
    with serve(settings) as api, api.client() as client:
        wanted = {"name": "child", "scopes": ["jobs:read"]}
        children = [client.post("/v1/keys", json=wanted).json() for _ in range(3)]
        rotated = client.post(f"/v1/keys/{children[0]['record']['id']}/rotate").json()
        codes = []
        for made in (*children, rotated):
            headers = {"Authorization": f"Bearer {made['key']}"}
            codes += [client.get("/v1/jobs", headers=headers).status_code for _ in range(3)]
        assert codes.count(200) == 4, "eight, of which four went to the keys' making"


def finish(api: RunningApi, client: httpx.Client, **more: Any) -> str:
    job = str(client.post("/v1/jobs", json={**JOB, "reuse": False, **more}).json()["id"])
    claimed = api.claim()
    assert api.services.resources.store.attempts.finish(claimed.lease, api.ship(claimed, {"model.onnx": job.encode()}))
    return job


@pytest.mark.slow
def test_an_accepted_result_is_the_names_latest_at_once(api: RunningApi, client: httpx.Client):
    assert client.get("/v1/models/tiny/latest").status_code == 404
    first = finish(api, client)
    latest = client.get("/v1/models/tiny/latest")
    assert latest.json()["promotion"]["job_id"] == first
    [artifact] = latest.json()["artifacts"]
    file = client.get(artifact["download_url"] + "model.onnx")
    assert file.content == first.encode()
    same = client.get("/v1/models/tiny/latest", headers={"If-None-Match": latest.headers["etag"]})
    assert same.status_code == 304
    finish(api, client, promote=False)
    assert client.get("/v1/models/tiny/latest").json()["promotion"]["job_id"] == first
    second = finish(api, client)
    assert client.get("/v1/models/tiny/latest").json()["promotion"]["job_id"] == second
    back = client.post("/v1/models/tiny/promotions", json={"job_id": first})
    assert (back.status_code, back.json()["cause"]) == (201, "manual")
    history = client.get("/v1/models/tiny/promotions").json()["items"]
    assert [row["job_id"] for row in history] == [first, second, first]
    queued = client.post("/v1/jobs", json=JOB).json()["id"]
    assert client.post("/v1/models/tiny/promotions", json={"job_id": queued}).json()["code"] == "conflict"
    assert client.post("/v1/models/tiny/promotions", json={"job_id": "job_no"}).status_code == 404


@pytest.mark.slow
def test_a_rejected_result_is_nobodys_latest_also_when_it_is_given_to_another_job(
    api: RunningApi, client: httpx.Client
):
    job = client.post("/v1/jobs", json={**JOB, "reuse": False}).json()["id"]
    claimed = api.claim()
    assert claimed.job.id == job
    rejected = replace(api.ship(claimed, {"model.onnx": b"worse"}), verdict="rejected")
    assert api.services.resources.store.attempts.finish(claimed.lease, rejected)
    given = client.post("/v1/jobs", json={**JOB, "reuse": True}).json()
    assert (given["state"], given["verdict"], given["reused_from"]) == ("succeeded", "rejected", job)
    assert client.get("/v1/models/tiny/latest").status_code == 404


@pytest.mark.slow
def test_a_job_that_was_submitted_earlier_and_ends_later_does_not_replace_a_newer_one(
    api: RunningApi, client: httpx.Client
):
    slow = client.post("/v1/jobs", json=JOB).json()["id"]
    held = api.claim()
    assert held.job.id == slow
    newer = finish(api, client)
    assert api.services.resources.store.attempts.finish(held.lease, api.ship(held, {"model.onnx": b"old"}))
    assert client.get("/v1/models/tiny/latest").json()["promotion"]["job_id"] == newer
