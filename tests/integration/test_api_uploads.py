"""Uploads of models and data sets over HTTP: parts through the API with local storage, presigned parts and downloads with S3."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nightpress import migrations
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.servers import S3


@pytest.fixture(params=["local", "s3"])
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningApi]:
    more: dict[str, Any] = {}
    if request.param == "s3":
        server: S3 = request.getfixturevalue("s3_server")
        more = {
            "storage_url": f"s3://{server.create_bucket()}/np",
            "s3_endpoint_url": server.endpoint,
            "s3_access_key_id": server.access_key,
            "s3_secret_access_key": server.secret_key,
        }
    settings = Settings(data_dir=tmp_path, broker_url="redis://127.0.0.1:1/0", **more)
    migrations.upgrade(settings.sql_url)
    with serve(settings) as running:
        yield running


@pytest.fixture
def client(api: RunningApi) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


def announcement(path: str, data: bytes) -> dict[str, Any]:
    return {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def send(client: httpx.Client, uploads: list[dict[str, Any]], contents: dict[str, bytes]) -> None:
    """PUT every part to its URL. A relative URL leads to the API; others lead to the store and get no API key."""
    for file in uploads:
        for part in file["parts"]:
            piece = contents[file["path"]][part["offset"] : part["offset"] + part["size"]]
            if part["url"].startswith("/"):
                response = client.put(part["url"], content=piece, headers=part["headers"])
            else:
                response = httpx.put(part["url"], content=piece, headers=part["headers"], trust_env=False)
            assert response.status_code in {200, 204}, response.text


@pytest.mark.slow
def test_an_uploaded_model_becomes_ready_and_can_be_pressed(client: httpx.Client, bert_tiny: Path):
    contents = {path.name: path.read_bytes() for path in bert_tiny.iterdir()}
    body = {"name": "tiny", "files": [announcement(name, data) for name, data in contents.items()]}
    made = client.post("/v1/models", json=body)
    assert made.status_code == 201, made.text
    model = made.json()
    assert (model["state"], made.headers["location"]) == ("uploading", f"/v1/models/{model['id']}")
    early = client.post("/v1/jobs", json={"model": "tiny", "recipe": "int8-encoder"})
    assert (early.status_code, early.json()["code"]) == (409, "conflict")
    incomplete = client.post(f"/v1/models/{model['id']}/complete")
    assert (incomplete.status_code, incomplete.json()["code"]) == (409, "conflict")

    first, *rest = model["uploads"]
    send(client, [first], contents)
    left = client.get(f"/v1/models/{model['id']}/uploads").json()["items"]
    assert {file["path"] for file in left} == {file["path"] for file in rest}
    send(client, left, contents)
    ready = client.post(f"/v1/models/{model['id']}/complete")
    assert ready.status_code == 200, ready.text
    assert (ready.json()["state"], ready.json()["model_type"]) == ("ready", "bert")
    assert client.get("/v1/models").json()["items"][0] == ready.json()
    assert client.post("/v1/jobs", json={"model": "tiny", "recipe": "int8-encoder"}).status_code == 201
    needed = client.delete(f"/v1/models/{model['id']}")
    assert (needed.status_code, needed.json()["code"]) == (409, "conflict")


@pytest.mark.slow
def test_other_bytes_than_announced_are_refused(client: httpx.Client):
    data = b"one\ntwo\n" * 100
    made = client.post("/v1/datasets", json={"name": "lines", "file": announcement("lines.txt", data)}).json()
    (part,) = made["uploads"][0]["parts"]
    wrong = b"x" * len(data)
    if part["url"].startswith("/"):
        refused = client.put(part["url"], content=wrong, headers=part["headers"])
        assert (refused.status_code, refused.json()["code"]) == (422, "checksum_mismatch")
        longer = client.put(part["url"], content=data + b"x")
        assert (longer.status_code, longer.json()["code"]) == (413, "payload_too_large")
    else:
        assert httpx.put(part["url"], content=wrong, headers=part["headers"], trust_env=False).status_code >= 400
    assert client.post(f"/v1/datasets/{made['id']}/complete").status_code in {409, 422}
    assert client.get("/v1/datasets/lines").json()["state"] != "ready"


@pytest.mark.slow
def test_a_data_set_is_uploaded_listed_and_deleted(client: httpx.Client):
    rows = "".join(json.dumps({"text": f"Sentence {number}.", "label": number % 2}) + "\n" for number in range(20))
    data = rows.encode()
    made = client.post("/v1/datasets", json={"name": "rows", "file": announcement("rows.jsonl", data)}).json()
    send(client, made["uploads"], {"rows.jsonl": data})
    ready = client.post(f"/v1/datasets/{made['id']}/complete").json()
    assert (ready["state"], ready["rows"], ready["labelled"]) == ("ready", 20, True)
    assert {item["name"] for item in client.get("/v1/datasets").json()["items"]} >= {"rows", "builtin:prose"}
    assert client.delete(f"/v1/datasets/{made['id']}").status_code == 204
    assert client.get("/v1/datasets/rows").status_code == 404


@pytest.mark.slow
def test_an_empty_data_set_is_refused(client: httpx.Client):
    made = client.post("/v1/datasets", json={"name": "none", "file": announcement("none.txt", b"")})
    if made.status_code == 201:
        made = client.post(f"/v1/datasets/{made.json()['id']}/complete")
    assert (made.status_code, made.json()["code"]) == (422, "invalid_data")


@pytest.mark.slow
def test_an_artifact_comes_from_wherever_it_lies(api: RunningApi, client: httpx.Client, bert_tiny: Path):
    contents = {path.name: path.read_bytes() for path in bert_tiny.iterdir()}
    body = {"name": "tiny", "files": [announcement(name, data) for name, data in contents.items()]}
    model = client.post("/v1/models", json=body).json()
    send(client, model["uploads"], contents)
    client.post(f"/v1/models/{model['id']}/complete").raise_for_status()
    job_id = client.post("/v1/jobs", json={"model": "tiny", "recipe": "int8-encoder"}).json()["id"]
    claimed = api.claim()
    api.services.resources.store.attempts.finish(claimed.lease, api.ship(claimed, {"model.onnx": b"0123456789"}))
    got = client.get(f"/v1/jobs/{job_id}/artifacts/onnx/files/model.onnx")
    if got.status_code == 307:
        got = httpx.get(got.headers["location"], trust_env=False)  # without an API key: the presigned URL is enough
        assert "model.onnx" in got.headers["content-disposition"]
    assert got.status_code == 200
    assert got.content == b"0123456789"
    assert client.get(f"/v1/jobs/{job_id}/report.md").text == "this is report.md"
