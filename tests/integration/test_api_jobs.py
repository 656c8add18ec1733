"""Jobs over HTTP on both databases: submitted once, found, followed, cancelled, retried, and their results fetched."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.records import Worker
from nightpress.core.service.jobs.retention import JobRetention
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.jobs import age

SOON = {"model": "tiny", "recipe": "int8-encoder"}


@pytest.fixture
def api(sql_url: str, tmp_path: Path, bert_tiny: Path) -> Iterator[RunningApi]:
    settings = Settings(
        data_dir=tmp_path,
        database_url=sql_url,
        broker_url="redis://127.0.0.1:1/0",  # no broker: a failed ring must not matter
        model_roots=[bert_tiny.parent],
        max_queued_jobs=8,
    )
    with serve(settings) as running:
        yield running


@pytest.fixture
def client(api: RunningApi, bert_tiny: Path) -> Iterator[httpx.Client]:
    with api.client() as client:
        made = client.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)})
        assert made.status_code == 201, made.text
        yield client


def submit(client: httpx.Client, **more: object) -> str:
    response = client.post("/v1/jobs", json={**SOON, **more})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


@pytest.mark.slow
def test_a_submitted_job_is_queued_and_found_at_its_location(client: httpx.Client):
    response = client.post("/v1/jobs", json={**SOON, "name": "nightly", "labels": {"team": "search"}, "priority": 5})
    assert response.status_code == 201
    job = response.json()
    assert (job["state"], job["name"], job["priority"], job["model_name"]) == ("queued", "nightly", 5, "tiny")
    assert job["recipe"]["passes"][0]["pass"] == "dynamic-int8"
    assert "tenant_id" not in job
    assert "lease_id" not in job
    assert client.get(response.headers["location"]).json() == job


def test_the_same_key_and_body_make_one_job(client: httpx.Client):
    headers = {"Idempotency-Key": "nightly-1"}
    first = client.post("/v1/jobs", json=SOON, headers=headers)
    second = client.post("/v1/jobs", json=SOON, headers=headers)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    other = client.post("/v1/jobs", json={**SOON, "priority": 1}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert len(client.get("/v1/jobs").json()["items"]) == 1


@pytest.mark.slow
def test_who_prefers_to_wait_is_answered_when_the_job_has_ended(api: RunningApi, client: httpx.Client):
    def soon() -> None:
        claimed = api.claim()
        api.services.resources.store.attempts.fail(
            claimed.lease, NightpressError(ErrorCode.NUMERICAL_FAILURE, "over"), backoff_s=0
        )

    later = threading.Timer(0.3, soon)
    later.start()
    ended = client.post("/v1/jobs", json=SOON, headers={"Prefer": "respond-async, wait=15"})
    later.join()
    assert (ended.status_code, ended.json()["state"]) == (201, "failed")
    assert ended.headers["preference-applied"] == "wait=15"
    again = client.get(f"/v1/jobs/{ended.json()['id']}", headers={"Prefer": "wait=99999"})
    assert (again.json()["state"], again.headers["preference-applied"]) == ("failed", "wait=60")
    waiting = client.post("/v1/jobs", json=SOON, headers={"Prefer": "wait=1"})
    assert waiting.json()["state"] == "queued"
    assert "preference-applied" not in client.get(f"/v1/jobs/{ended.json()['id']}", headers={"Prefer": "wait"}).headers


def test_a_batch_is_submitted_whole_or_refused_with_every_fault(client: httpx.Client):
    made = client.post("/v1/jobs:batch", json={"jobs": [{**SOON, "name": "a"}, {**SOON, "name": "b"}]})
    assert made.status_code == 201
    assert [job["name"] for job in made.json()["items"]] == ["a", "b"]
    wrong = {"jobs": [SOON, {**SOON, "model": "nobody"}, {**SOON, "recipe": "nothing"}]}
    refused = client.post("/v1/jobs:batch", json=wrong)
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    assert [fault["at"] for fault in refused.json()["errors"]] == ["body.jobs.1", "body.jobs.2"]
    assert client.post("/v1/jobs:batch", json={"jobs": []}).status_code == 422
    assert client.post("/v1/jobs:batch", json={"jobs": [SOON] * 101}).status_code == 422
    assert len(client.get("/v1/jobs").json()["items"]) == 2


def test_jobs_are_cancelled_by_what_they_are_and_never_by_mistake(client: httpx.Client):
    for label in ("x", "x", "y"):
        client.post("/v1/jobs", json={**SOON, "labels": {"suite": label}}).raise_for_status()
    assert client.post("/v1/jobs:cancel", json={}).status_code == 422
    assert client.post("/v1/jobs:cancel", json={"labels": {"suite": "x"}, "all": True}).status_code == 422
    done = client.post("/v1/jobs:cancel", json={"labels": {"suite": "x"}, "state": ["queued"]})
    assert done.json() == {"cancelled": 2, "more": False}
    left = client.get("/v1/jobs", params={"state": "queued"}).json()["items"]
    assert [job["labels"] for job in left] == [{"suite": "y"}]
    moment = left[0]["created_at"]
    assert client.get("/v1/jobs", params={"created_before": moment, "queue": "cpu"}).json()["items"][0] != left[0]
    assert client.get("/v1/jobs", params={"created_after": moment}).json()["items"] == left
    assert client.get("/v1/jobs", params={"created_after": "yesterday"}).status_code == 422
    assert client.post("/v1/jobs:cancel", json={"all": True}).json() == {"cancelled": 1, "more": False}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nobody", "recipe": "int8-encoder"}, 404, "not_found"),
        ({"model": "tiny", "recipe": "nothing"}, 404, "not_found"),
        ({"model": "tiny", "recipe": {"name": "x", "passes": [{"pass": "magic"}], "exports": ["onnx"]}}, 422, "invalid_recipe"),
        ({"model": "tiny", "recipe": {"name": "x", "passes": [{"pass": "weight-only", "bits": "many"}], "exports": ["onnx"]}}, 422, "invalid_recipe"),
        ({"model": "tiny", "recipe": "int8-encoder", "run_after": "2026-11-24T01:00:00"}, 422, "invalid_request"),
        ({"model": "tiny", "recipe": "int8-encoder", "name": "two\nlines"}, 422, "invalid_request"),
        ({"model": "tiny", "recipe": "int8-encoder", "name": "a\0b"}, 422, "invalid_request"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_job_that_cannot_be_is_refused_and_nothing_is_written(
    client: httpx.Client, body: dict[str, object], status: int, code: str
):
    response = client.post("/v1/jobs", json=body)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.json()["hint"]
    assert client.get("/v1/jobs").json()["items"] == []


def test_pages_hold_every_job_once_newest_first(client: httpx.Client):
    made = [submit(client) for _ in range(5)]
    seen: list[str] = []
    cursor = None
    while True:
        page = client.get("/v1/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == made[::-1]


@pytest.mark.slow
def test_lists_are_filtered_by_state_label_and_model(client: httpx.Client):
    labelled = submit(client, labels={"team": "search", "tier": "1"})
    plain = submit(client)
    client.post(f"/v1/jobs/{plain}/cancel")

    def ids(**params: object) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", params=params).json()["items"]]

    assert ids(state="cancelled") == [plain]
    assert ids(state=["queued", "cancelled"]) == [plain, labelled]
    assert ids(label=["team=search", "tier=1"]) == [labelled]
    assert ids(label="team=other") == []
    assert ids(model="tiny") == [plain, labelled]
    assert ids(model="other") == []


@pytest.mark.slow
def test_a_queued_job_is_cancelled_at_once_and_a_running_one_when_its_worker_has_stopped(
    api: RunningApi, client: httpx.Client
):
    running, queued = submit(client, priority=1), submit(client)
    claimed = api.claim()
    assert claimed.job.id == running
    assert client.post(f"/v1/jobs/{queued}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/v1/jobs/{running}/cancel").json()["state"] == "cancelling"
    assert client.post(f"/v1/jobs/{running}/cancel").json()["state"] == "cancelling"
    assert api.services.resources.store.attempts.confirm_cancelled(claimed.lease)
    assert client.get(f"/v1/jobs/{running}").json()["state"] == "cancelled"


@pytest.mark.slow
def test_a_retry_is_a_new_job_and_only_of_one_that_has_ended(client: httpx.Client):
    first = submit(client, labels={"team": "search"})
    assert client.post(f"/v1/jobs/{first}/retry").json()["code"] == "conflict"
    client.post(f"/v1/jobs/{first}/cancel")
    again = client.post(f"/v1/jobs/{first}/retry")
    assert again.status_code == 201
    assert again.json()["retry_of"] == first
    assert again.json()["labels"] == {"team": "search"}
    assert client.get(f"/v1/jobs/{first}").json()["state"] == "cancelled"


@pytest.mark.slow
def test_a_full_queue_says_so_and_when_to_come_back(client: httpx.Client):
    for _ in range(8):
        submit(client)
    refused = client.post("/v1/jobs", json=SOON)
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert int(refused.headers["retry-after"]) > 0


@pytest.mark.slow
def test_a_failed_job_carries_its_error(api: RunningApi, client: httpx.Client):
    job_id = submit(client)
    claimed = api.claim()
    error = NightpressError(ErrorCode.VERIFICATION_FAILED, "The artifact disagrees.", hint="Use more bits.")
    assert api.services.resources.store.attempts.fail(claimed.lease, error, backoff_s=1) == "failed"
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["error"]["code"], job["error"]["hint"]) == (
        "failed",
        "verification_failed",
        "Use more bits.",
    )
    assert 'nightpress_job_failures_total{code="verification_failed"} 1.0' in client.get("/metrics").text


@pytest.mark.slow
def test_results_appear_with_the_commit_and_not_before(api: RunningApi, client: httpx.Client):
    job_id = submit(client)
    claimed = api.claim()
    outcome = api.ship(claimed, {"model.onnx": b"0123456789", "deep/er.json": b"{}"})
    download = f"/v1/jobs/{job_id}/artifacts/onnx/files/model.onnx"
    assert client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"] == []
    for path in (
        download,
        f"/v1/jobs/{job_id}/report",
        f"/v1/jobs/{job_id}/report.html",
        f"/v1/jobs/{job_id}/report.md",
    ):
        assert client.get(path).status_code == 404

    assert api.services.resources.store.attempts.finish(claimed.lease, outcome)
    (artifact,) = client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
    assert (artifact["format"], artifact["size"], artifact["consumer"]) == ("onnx", 12, "onnxruntime 1.32.0")
    for file in artifact["files"]:
        got = client.get(artifact["download_url"] + file["path"])
        assert got.status_code == 200
        assert hashlib.sha256(got.content).hexdigest() == file["sha256"]
    report = client.get(f"/v1/jobs/{job_id}/report").json()
    assert report["report"] == outcome.report
    page = client.get(report["html_url"])
    assert page.text == "this is report.html"
    assert "sandbox" in page.headers["content-security-policy"]
    assert client.get(report["markdown_url"]).headers["content-type"].startswith("text/markdown")


@pytest.mark.slow
def test_an_identical_job_is_given_the_result_at_once_and_says_whose_it_is(api: RunningApi, client: httpx.Client):
    first = submit(client, reuse=True, promote=False)
    assert client.get(f"/v1/jobs/{first}").json()["state"] == "queued", "there is nothing to reuse yet"
    claimed = api.claim()
    shipped = api.ship(claimed, {"model.onnx": b"0123456789"})
    api.services.resources.store.attempts.finish(claimed.lease, shipped)

    again = client.get(f"/v1/jobs/{submit(client, reuse=True, promote=False, name='again')}").json()
    assert (again["state"], again["verdict"], again["attempt"]) == ("succeeded", "accepted", 0)
    assert again["reused_from"] == first
    (artifact,) = client.get(f"/v1/jobs/{again['id']}/artifacts").json()["items"]
    assert client.get(artifact["download_url"] + "model.onnx").content == b"0123456789"
    report = client.get(f"/v1/jobs/{again['id']}/report").json()
    assert report["report"] == {**shipped.report, "reused_from": first}
    for url in (report["html_url"], report["markdown_url"]):
        assert client.get(url).text.startswith("this is report.")
    assert first in client.get(report["markdown_url"]).text
    # For `verify`, the files are as they were signed.
    assert client.get(report["markdown_url"], params={"unchanged": True}).text == "this is report.md"
    assert client.get(report["html_url"], params={"unchanged": True}).text == "this is report.html"
    assert client.get(f"/v1/jobs/{again['id']}/report.json").text == "this is report.json"
    assert artifact["signed"]
    signed = [client.get(f"/v1/jobs/{job}/artifacts/onnx/attestation").json() for job in (first, again["id"])]
    assert [bundle["mediaType"] for bundle in signed] == ["application/vnd.dev.sigstore.bundle.v0.3+json"] * 2
    kinds = [event["kind"] for event in client.get(f"/v1/jobs/{again['id']}/events").json()["items"]]
    assert kinds == ["queued", "succeeded"]

    resources = api.services.resources
    retention = JobRetention(resources.engine, resources.objects)
    for job_id in (again["id"], first):
        age(resources.engine, job_id, 1000.0, "finished_at")
        retention.prune_artifacts(900.0)
    assert client.get(f"/v1/jobs/{again['id']}/artifacts").json()["items"] == []
    assert client.get(report["html_url"]).text.startswith("this is report."), "artifacts go, reports stay"
    age(resources.engine, first, 1000.0, "finished_at")
    assert retention.prune_jobs(1500.0) == 1
    gone = client.get(report["html_url"])
    assert gone.status_code == 404
    assert first in gone.json()["detail"]
    assert client.get(f"/v1/jobs/{again['id']}/report").json()["report"] == report["report"]


@pytest.mark.slow
def test_nothing_is_reused_unasked_by_force_by_strangers_or_for_something_else(
    api: RunningApi, client: httpx.Client, bert_tiny: Path
):
    submit(client)
    claimed = api.claim()
    api.services.resources.store.attempts.finish(claimed.lease, api.ship(claimed, {"model.onnx": b"0123456789"}))
    other = {"name": "n", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"]}
    runs = [submit(client), submit(client, reuse=True, force=True), submit(client, reuse=True, recipe=other)]
    runs.append(client.post(f"/v1/jobs/{claimed.job.id}/retry").json()["id"])
    assert {client.get(f"/v1/jobs/{job_id}").json()["state"] for job_id in runs} == {"queued"}
    with api.client(tenant_id="stranger") as stranger:
        stranger.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)})
        job = stranger.post("/v1/jobs", json={**SOON, "reuse": True}).json()
        assert (job["state"], job["reused_from"]) == ("queued", None)


@pytest.mark.slow
def test_downloads_resume_where_they_stopped(api: RunningApi, client: httpx.Client):
    job_id = submit(client)
    claimed = api.claim()
    content = bytes(range(256)) * 1000
    api.services.resources.store.attempts.finish(claimed.lease, api.ship(claimed, {"model.onnx": content}))
    url = f"/v1/jobs/{job_id}/artifacts/onnx/files/model.onnx"
    whole = client.get(url)
    etag = whole.headers["etag"]
    assert etag == f'"{hashlib.sha256(content).hexdigest()}"'
    assert whole.headers["content-disposition"].startswith('attachment; filename="model.onnx"')

    def part(value: str, **headers: str) -> tuple[int, bytes, str | None]:
        got = client.get(url, headers={"Range": value, **headers})
        return got.status_code, got.content, got.headers.get("content-range")

    size = len(content)
    assert part("bytes=1000-") == (206, content[1000:], f"bytes 1000-{size - 1}/{size}")
    assert part("bytes=0-") == (206, content, f"bytes 0-{size - 1}/{size}")
    assert part("bytes=5-9") == (206, content[5:10], f"bytes 5-9/{size}")
    assert part("bytes=-7") == (206, content[-7:], f"bytes {size - 7}-{size - 1}/{size}")
    assert part("bytes=5-9999999") == (206, content[5:], f"bytes 5-{size - 1}/{size}")
    assert part("bytes=5-9", **{"If-Range": etag})[0] == 206
    assert part("bytes=5-9", **{"If-Range": '"another version"'}) == (200, content, None)
    assert part("bytes=9-5") == (200, content, None)
    assert part("bytes=1-2,5-6") == (200, content, None)
    assert part(f"bytes={size}-")[0] == 416
    assert client.get(url, headers={"If-None-Match": etag}).status_code == 304
    assert client.get(f"/v1/jobs/{job_id}/artifacts/onnx/files/../../report.json").status_code == 404
    assert client.get(f"/v1/jobs/{job_id}/artifacts/onnx/files/nothing").status_code == 404


@pytest.mark.slow
def test_workers_are_listed_with_what_they_do(api: RunningApi, client: httpx.Client):
    store = api.services.resources.store
    worker = Worker(id="test-worker", host="h", queue="cpu", device="cpu", memory=1 << 40, threads=1, version="1")
    store.roster.heartbeat_worker(worker)
    job_id = submit(client)
    api.claim()
    (seen,) = client.get("/v1/workers").json()["items"]
    assert (seen["id"], seen["state"], seen["job_id"]) == ("test-worker", "busy", job_id)
    with api.client(tenant_id="other") as stranger:
        (seen,) = stranger.get("/v1/workers").json()["items"]
        assert (seen["state"], seen["job_id"]) == ("busy", None)


@pytest.mark.slow
def test_recipes_are_listed_described_and_checked_against_a_model(client: httpx.Client):
    names = [item["name"] for item in client.get("/v1/recipes").json()["items"]]
    assert "int8-encoder" in names
    assert client.get("/v1/recipes/int8-encoder").json()["exports"]
    assert client.get("/v1/recipes/schema").json()["properties"]["passes"]
    text = "name: half\npasses: [{pass: magnitude, sparsity: 0.5}]\nexports: [safetensors]\n"
    plan = client.post("/v1/recipes/validate", json={"recipe": text, "model": "tiny"}).json()["plan"]
    assert [step["kind"] for step in plan["steps"]][:2] == ["pass", "export"]
    assert plan["estimate"]["memory_bytes"] > 0
    assert plan["warnings"]
    assert client.post("/v1/recipes/validate", json={"recipe": text}).json()["plan"]["estimate"] is None
    wrong = client.post("/v1/recipes/validate", json={"recipe": "name: [", "model": "tiny"})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid_recipe")


def test_a_key_knows_itself(client: httpx.Client):
    assert client.get("/v1/me").json()["tenant_id"] == "default"
    assert "jobs:write" in client.get("/v1/me").json()["scopes"]


@pytest.mark.slow
def test_a_job_and_a_plan_say_why_they_go_where_they_go(client: httpx.Client):
    recipe = client.get("/v1/recipes/int8-encoder").json()["recipe"]
    plan = client.post("/v1/recipes/validate", json={"recipe": recipe, "model": "tiny"}).json()["plan"]
    job = client.get(f"/v1/jobs/{submit(client)}").json()
    assert job["queue"] == plan["queue"] == "cpu"
    assert job["queue_reason"] == plan["queue_reason"] == "`dynamic-int8` runs on a processor alone."
    assert job["notice"] is None


@pytest.mark.slow
def test_a_job_without_a_worker_for_an_hour_says_so_wherever_it_is_shown(api: RunningApi, client: httpx.Client):
    job_id = submit(client)
    age(api.services.resources.engine, job_id, 3700, "created_at", "run_after")
    shown = [client.get(f"/v1/jobs/{job_id}").json(), *client.get("/v1/jobs").json()["items"]]
    shown.append(client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=1"}).json())
    for job in shown:
        assert "No cpu worker has been seen lately" in job["notice"]
    assert 'nightpress_queue_unserved_seconds{queue="cpu"} +Inf' in client.get("/metrics").text
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["notice"] is None
