"""Event and log streams: complete, without duplicates, resumable, cheap, and closed when the job has ended."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from nightpress.api import sse
from nightpress.core.database import make_engine
from nightpress.core.service.jobs.positions import read_positions
from nightpress.core.service.jobs.records import Claimed
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.patience import slowness

STREAM = {"Accept": "text/event-stream"}


@dataclass
class Message:
    id: int
    event: str
    data: dict[str, object]


def messages(response: httpx.Response) -> Iterator[Message]:
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and "data" in fields:
            yield Message(int(fields["id"]), fields["event"], json.loads(fields["data"]))
            fields = {}


@pytest.fixture
def api(sql_url: str, tmp_path: Path, bert_tiny: Path) -> Iterator[RunningApi]:
    settings = Settings(
        data_dir=tmp_path, database_url=sql_url, broker_url="redis://127.0.0.1:1/0", model_roots=[bert_tiny.parent]
    )
    with serve(settings) as running:
        yield running


@pytest.fixture
def client(api: RunningApi, bert_tiny: Path) -> Iterator[httpx.Client]:
    with api.client() as client:
        client.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)}).raise_for_status()
        yield client


@pytest.fixture
def running(api: RunningApi, client: httpx.Client) -> Claimed:
    """A job that a worker has just claimed."""
    client.post("/v1/jobs", json={"model": "tiny", "recipe": "int8-encoder"}).raise_for_status()
    return api.claim()


@pytest.mark.slow
def test_a_stream_has_every_event_once_in_order_and_ends_with_the_job(
    api: RunningApi, client: httpx.Client, running: Claimed
):
    def work() -> None:
        for step in range(450):  # more than two pages
            api.services.resources.store.attempts.record_event(running.lease, "checkpoint", {"step": step})
        api.services.resources.store.attempts.finish(running.lease, api.ship(running, {"model.onnx": b"x"}))

    worker = threading.Thread(target=work)
    with client.stream("GET", f"/v1/jobs/{running.job.id}/events", headers=STREAM) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        worker.start()
        seen = list(messages(response))
    worker.join()
    assert [item.id for item in seen] == list(range(1, len(seen) + 1))
    assert [item.data["seq"] for item in seen] == [item.id for item in seen]
    assert [item.event for item in seen[:2]] == ["queued", "started"]
    assert [item.data["data"] for item in seen if item.event == "checkpoint"] == [{"step": n} for n in range(450)]
    assert seen[-1].event == "succeeded"


@pytest.mark.slow
def test_a_cut_stream_goes_on_after_the_last_id(api: RunningApi, client: httpx.Client, running: Claimed):
    path = f"/v1/jobs/{running.job.id}/events"
    for step in range(5):
        api.services.resources.store.attempts.record_event(running.lease, "checkpoint", {"step": step})
    with client.stream("GET", path, headers=STREAM) as response:
        first = [message.id for message, _ in zip(messages(response), range(4), strict=False)]
    api.services.resources.store.attempts.finish(running.lease, api.ship(running, {"model.onnx": b"x"}))
    with client.stream("GET", path, headers={**STREAM, "Last-Event-ID": str(first[-1])}) as response:
        rest = [message.id for message in messages(response)]
    assert first + rest == list(range(1, 9))
    # The client has all events: 204 tells an EventSource not to reconnect.
    assert client.get(path, headers={**STREAM, "Last-Event-ID": "8"}).status_code == 204
    assert client.get(path, headers={**STREAM, "Last-Event-ID": "eight"}).status_code == 422


@pytest.mark.slow
def test_a_stream_of_logs_follows_the_worker(api: RunningApi, client: httpx.Client, running: Claimed):
    store = api.services.resources.store
    with client.stream("GET", f"/v1/jobs/{running.job.id}/logs", headers=STREAM) as response:
        lines = messages(response)
        store.attempts.append_logs(running.lease, [("info", "one"), ("warning", "two\nlines")])
        assert [next(lines).data["text"], next(lines).data["text"]] == ["one", "two\nlines"]
        store.attempts.append_logs(running.lease, [("info", "three")])
        store.attempts.finish(running.lease, api.ship(running, {"model.onnx": b"x"}))
        assert [line.data["text"] for line in lines] == ["three"]


@pytest.mark.slow
def test_history_is_also_there_as_pages(api: RunningApi, client: httpx.Client, running: Claimed):
    store = api.services.resources.store
    store.attempts.append_logs(running.lease, [("info", str(number)) for number in range(5)])
    page = client.get(f"/v1/jobs/{running.job.id}/logs", params={"limit": 3}).json()
    assert [line["text"] for line in page["items"]] == ["0", "1", "2"]
    rest = client.get(f"/v1/jobs/{running.job.id}/logs", params={"after": page["next_cursor"], "limit": 3}).json()
    assert [line["text"] for line in rest["items"]] == ["3", "4"]
    assert rest["next_cursor"] is None
    events = client.get(f"/v1/jobs/{running.job.id}/events").json()["items"]
    assert [(event["seq"], event["kind"]) for event in events] == [(1, "queued"), (2, "started")]


@pytest.mark.slow
def test_a_silent_stream_has_a_heartbeat_and_an_end(
    client: httpx.Client, running: Claimed, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(sse, "LONGEST_S", 1.0)
    began = time.monotonic()
    with client.stream("GET", f"/v1/jobs/{running.job.id}/events", headers=STREAM) as response:
        lines = list(response.iter_lines())
    assert lines.count(": still here") >= 2
    assert time.monotonic() - began < 5 * slowness()


@pytest.mark.slow
def test_streams_end_when_the_server_stops(tmp_path: Path, sqlite_url: str, bert_tiny: Path):
    settings = Settings(
        data_dir=tmp_path, database_url=sqlite_url, broker_url="redis://127.0.0.1:1/0", model_roots=[bert_tiny.parent]
    )
    ended = threading.Event()

    def follow(client: httpx.Client, job_id: str) -> None:
        with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
            for _ in response.iter_lines():
                started.set()
        ended.set()

    started = threading.Event()
    with serve(settings) as running:
        client = running.client()
        client.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)}).raise_for_status()
        job_id = client.post("/v1/jobs", json={"model": "tiny", "recipe": "int8-encoder"}).json()["id"]
        follower = threading.Thread(target=follow, args=(client, job_id))
        follower.start()
        assert started.wait(10 * slowness())
        began = time.monotonic()
    follower.join(10 * slowness())
    client.close()
    assert ended.is_set()
    assert time.monotonic() - began < 4 * slowness()


@pytest.mark.slow
def test_two_hundred_streams_ask_the_database_no_more_often_than_one(
    api: RunningApi, client: httpx.Client, running: Claimed, monkeypatch: pytest.MonkeyPatch
):
    asked = 0

    def counted(job_ids: list[str]) -> object:
        nonlocal asked
        asked += 1
        return read_positions(api.services.resources.engine, job_ids)

    monkeypatch.setattr(api.services.tail, "_positions", counted)
    url, headers = f"/v1/jobs/{running.job.id}/events", {**STREAM, "Last-Event-ID": "2"}
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(
        base_url=api.url, headers=client.headers, limits=limits, timeout=20 * slowness(), trust_env=False
    ) as many:
        streams = [many.send(many.build_request("GET", url, headers=headers), stream=True) for _ in range(200)]
        assert "nightpress_event_streams 200.0" in client.get("/metrics").text
        before, began = asked, time.monotonic()
        time.sleep(2)
        assert asked - before <= (time.monotonic() - began) / 0.25 + 2
        api.services.resources.store.attempts.finish(running.lease, api.ship(running, {"model.onnx": b"x"}))
        assert [[message.event for message in messages(stream)] for stream in streams] == [["succeeded"]] * 200
        for stream in streams:
            stream.close()


@pytest.mark.slow
def test_positions_are_of_the_jobs_asked_for_alone(api: RunningApi, client: httpx.Client, running: Claimed):
    engine = make_engine(api.services.resources.settings.sql_url)
    found = read_positions(engine, [running.job.id, "job_missing"])
    engine.dispose()
    assert found == {running.job.id: ("running", 2, 0)}
