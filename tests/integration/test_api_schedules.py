"""Schedules over HTTP, and from the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from nightpress import migrations
from nightpress.client.cli.main import app
from nightpress.client.client import Client
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve

NIGHTLY = {
    "name": "nightly",
    "cron": "0  2 * * *",
    "timezone": "Europe/Berlin",
    "job": {"model": "tiny", "recipe": "int8-encoder", "labels": {"team": "search"}},
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("schedules"),
        broker_url="redis://127.0.0.1:1/0",
        model_roots=[tmp_path_factory.mktemp("models")],
    )
    migrations.upgrade(settings.sql_url)
    with serve(settings) as running:
        yield running


@pytest.fixture
def client(api: RunningApi, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    with api.client(tenant_id=request.node.name[:60]) as client:
        yield client


@pytest.mark.slow
def test_made_edited_with_its_etag_suspended_resumed_triggered_and_deleted(client: httpx.Client):
    made = client.post("/v1/schedules", json=NIGHTLY)
    assert (made.status_code, made.headers["etag"]) == (201, '"v1"')
    assert made.headers["location"] == f"/v1/schedules/{made.json()['id']}"
    assert made.json()["cron"] == "0 2 * * *"
    assert len(made.json()["upcoming"]) == 5
    assert client.post("/v1/schedules", json=NIGHTLY).json()["code"] == "conflict"

    edited = client.patch("/v1/schedules/nightly", json={"overlap": "queue"}, headers={"If-Match": '"v1"'})
    assert (edited.json()["overlap"], edited.headers["etag"]) == ("queue", '"v2"')
    for stale in ('"v1"', "v2", "nonsense"):
        refused = client.patch("/v1/schedules/nightly", json={"overlap": "skip"}, headers={"If-Match": stale})
        assert (refused.status_code, refused.json()["code"]) == (412, "precondition_failed")
    assert client.delete("/v1/schedules/nightly", headers={"If-Match": '"v1"'}).status_code == 412

    assert client.post("/v1/schedules/nightly/suspend").json()["upcoming"] == []
    assert client.post("/v1/schedules/nightly/resume").json()["upcoming"]
    run = client.post("/v1/schedules/nightly/trigger")
    assert (run.status_code, run.json()["cause"], run.json()["state"]) == (201, "manual", "pending")
    assert [item["id"] for item in client.get("/v1/schedules/nightly/runs").json()["items"]] == [run.json()["id"]]
    assert client.delete("/v1/schedules/nightly").status_code == 204
    assert client.get("/v1/schedules/nightly").status_code == 404


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"cron": "* * * * *"}, "invalid_schedule"),
        ({"cron": "0 0 30 2 *"}, "invalid_schedule"),
        ({"timezone": "../../etc/localtime"}, "invalid_schedule"),
        ({"overlap": "explode"}, "invalid_request"),
        ({"tenant_id": "other"}, "invalid_request"),
        ({"next_at": "2026-01-01T00:00:00Z"}, "invalid_request"),
        ({"job": {"model": "tiny", "recipe": {"name": "x", "passes": [{"pass": "nothing"}]}}}, "invalid_recipe"),
        ({"job": {"model": "tiny", "recipe": "int8-encoder", "run_after": "2027-01-01T00:00:00Z"}}, "invalid_request"),
    ],
)
def test_what_can_never_work_is_refused(client: httpx.Client, change: dict[str, object], code: str):
    response = client.post("/v1/schedules", json={**NIGHTLY, **change})
    assert (response.status_code, response.json()["code"]) == (422, code)
    assert client.get("/v1/schedules").json()["items"] == []


def test_lists_are_pages(client: httpx.Client):
    for number in range(5):
        client.post("/v1/schedules", json={**NIGHTLY, "name": f"s{number}"}).raise_for_status()
    seen, cursor = [], None
    while True:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = client.get("/v1/schedules", params=params).json()
        seen += [item["name"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ["s4", "s3", "s2", "s1", "s0"]


@pytest.mark.slow
def test_the_client_and_the_command_do_the_same(api: RunningApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    key = api.key(tenant_id="cli")
    monkeypatch.setenv("NIGHTPRESS_API_URL", api.url)
    monkeypatch.setenv("NIGHTPRESS_API_KEY", key)
    runner = CliRunner()

    def call(*words: str) -> str:
        result = runner.invoke(app, ["schedule", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    told = call(
        "add", "nightly", "-c", "0 2 * * *", "-z", "Asia/Tokyo", "-m", "tiny", "-r", "int8-encoder", "-l", "a=b"
    )
    assert "Asia/Tokyo" in told
    assert "17:00Z" in told
    assert "nightly" in call()
    changed = json.loads(call("edit", "nightly", "--overlap", "replace", "--recipe", "int4-weights", "--json"))
    assert (changed["overlap"], changed["job"]["recipe"], changed["job"]["labels"]) == (
        "replace",
        "int4-weights",
        {"a": "b"},
    )
    folder = api.services.resources.settings.model_roots[0] / "tiny"
    moved = json.loads(call("edit", "nightly", "--source", str(folder), "--json"))
    assert (moved["source"], moved["overlap"]) == (str(folder), "replace")
    assert json.loads(call("edit", "nightly", "--catch-up", "none", "--json"))["source"] == str(folder)
    assert json.loads(call("edit", "nightly", "--source", "", "--json"))["source"] is None
    assert "suspended" in call("suspend", "nightly")
    assert "active" in call("resume", "nightly")
    call("trigger", "nightly")
    assert "manual" in call("show", "nightly")
    with Client(api.url, key) as client:
        assert [run.cause for run in client.schedules.runs("nightly")] == ["manual"]
        made = client.schedules.create("other", "0 3 * * 1", "tiny", "int8-encoder", overlap="queue", priority=5)
        assert (made.overlap, made.job.priority) == ("queue", 5)
    call("rm", "nightly")
    assert [load["name"] for load in json.loads(call("--json"))] == ["other"]
