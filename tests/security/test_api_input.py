"""S7, S9, S11: fields that a client may not set, bodies that it may not send, and invalid names."""

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from nightpress import migrations
from nightpress.api.downloads import safe_filename
from nightpress.api.sse import resume_point
from nightpress.core.errors import NightpressError
from nightpress.core.service.jobs.records import Job
from nightpress.core.settings import Settings
from nightpress.core.wire.jobs import JobCreate, JobView
from tests.api import RunningApi, serve
from tests.patience import slowness

MIB = 1024**2
BODY = {"model": "tiny", "recipe": "int8-encoder"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, bert_tiny: Path) -> Iterator[RunningApi]:
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("input"),
        broker_url="redis://127.0.0.1:1/0",
        model_roots=[bert_tiny.parent],
        max_model_bytes=MIB * MIB,
    )
    migrations.upgrade(settings.sql_url)
    with serve(settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(api: RunningApi, bert_tiny: Path) -> Iterator[httpx.Client]:
    with api.client() as client:
        client.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)}).raise_for_status()
        yield client


@pytest.fixture(autouse=True)
def _nothing_is_written(client: httpx.Client) -> Iterator[None]:
    yield
    assert client.get("/v1/jobs").json()["items"] == []
    assert [model["name"] for model in client.get("/v1/models").json()["items"]] == ["tiny"]


@pytest.mark.parametrize(
    "field",
    sorted(({field.name for field in fields(Job)} | JobView.model_fields.keys()) - JobCreate.model_fields.keys()),
)
def test_no_field_that_is_ours_can_be_assigned(client: httpx.Client, field: str):
    response = client.post("/v1/jobs", json={**BODY, field: "x"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["errors"][0]["at"] == f"body.{field}"


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/models", "/v1/datasets", "/v1/recipes/validate"])
def test_a_body_over_the_cap_is_refused_with_and_without_a_length(client: httpx.Client, path: str):
    announced = client.post(path, content=b" " * 10 * MIB, headers={"Content-Type": "application/json"})
    assert (announced.status_code, announced.json()["code"]) == (413, "payload_too_large")
    chunked = client.post(path, content=(b" " * 65536 for _ in range(32)), headers={"Content-Type": "application/json"})
    assert (chunked.status_code, chunked.json()["code"]) == (413, "payload_too_large")


def test_a_part_of_a_file_is_not_bound_by_the_cap_of_a_request_but_by_what_was_announced(client: httpx.Client):
    announced = client.put("/v1/models/tiny/parts/1", params={"path": "model.safetensors"}, content=b"x" * 2 * MIB)
    assert announced.json()["code"] == "conflict"  # the request reached the registry, where the model is ready already
    unannounced = client.put("/v1/models/tiny/parts/1", params={"path": "model.safetensors"}, content=iter([b"x"]))
    assert (unannounced.status_code, unannounced.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize(
    "more",
    [
        {"labels": {f"key{number}": "x" for number in range(33)}},
        {"labels": {"key": "x" * 257}},
        {"labels": {"key": "line\r\nSet-Cookie: x"}},
        {"labels": {"bad\nkey": "x"}},
        {"name": "\x1b[31mred"},
        {"name": "x" * 201},
        {"priority": 10**30},
        {"run_limit_s": 1e300},
        {"run_limit_s": -1},
        {"queue_limit_s": 0},
        {"run_after": "9999-12-31T23:59:59-12:00"},
        {"run_after": "2026-01-01"},
        {"max_failures": 10**6},
        {"model": "x" * 129},
        {"recipe": ["int8-encoder"]},
    ],
)
def test_values_that_are_too_large_or_no_text_are_refused(client: httpx.Client, more: dict[str, object]):
    response = client.post("/v1/jobs", json={**BODY, **more})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(client: httpx.Client, number: str):
    text = f'{{"model": "tiny", "recipe": "int8-encoder", "run_limit_s": {number}}}'
    response = client.post("/v1/jobs", content=text, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_a_recipe_of_two_hundred_passes_is_refused(client: httpx.Client):
    recipe = {"name": "long", "passes": [{"pass": "magnitude"}] * 200, "exports": ["safetensors"]}
    for response in (
        client.post("/v1/jobs", json={"model": "tiny", "recipe": recipe}),
        client.post("/v1/recipes/validate", json={"recipe": recipe}),
    ):
        assert (response.status_code, response.json()["code"]) == (422, "invalid_recipe")


def test_yaml_that_unfolds_or_calls_is_refused(client: httpx.Client):
    bomb = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{key}: &{key} [{', '.join(['*' + chr(ord(key) - 1)] * 8)}]\n" for key in "bcdefghijklm"
    )
    for text in (bomb, "!!python/object/apply:os.system ['true']", "x" * 70_000):
        response = client.post("/v1/recipes/validate", json={"recipe": text})
        assert response.status_code == 422
        assert len(response.content) < 20_000


def test_a_model_larger_than_the_quota_is_refused(client: httpx.Client):
    file = {"path": "model.safetensors", "size": 2 * MIB * MIB, "sha256": "0" * 64}
    response = client.post("/v1/models", json={"name": "huge", "files": [file]})
    assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize("path", ["model.zip", "model.tar", "weights/model.tar.gz", "model.7z", "model.safetensors.gz"])
def test_no_archive_is_taken(client: httpx.Client, path: str):
    """Nothing is ever unpacked, so there are no path traversals, no bombs and no archives with a million entries."""
    files = [{"path": path, "size": 1, "sha256": "0" * 64}, {"path": "config.json", "size": 1, "sha256": "0" * 64}]
    response = client.post("/v1/models", json={"name": "packed", "files": files})
    assert (response.status_code, response.json()["code"]) == (422, "unsupported_format")
    data = {"name": "packed", "file": {"path": path, "size": 1, "sha256": "0" * 64}}
    assert client.post("/v1/datasets", json=data).status_code == 422


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "..\\x", "x\u202ey", "./x", "con\ntrol"])
def test_a_files_name_is_a_plain_relative_path(client: httpx.Client, path: str):
    files = [{"path": path, "size": 1, "sha256": "0" * 64}]
    response = client.post("/v1/models", json={"name": "sly", "files": files})
    assert response.status_code == 422


def test_a_server_path_outside_the_roots_says_nothing_of_what_is_there(client: httpx.Client, tmp_path: Path):
    answers = []
    for path in ("/etc", "/no/such/folder", str(tmp_path), "relative", "/etc/\u0000"):
        response = client.post("/v1/models", json={"name": "sly", "path": path})
        assert response.json()["code"] in {"path_not_allowed", "invalid_request"}, path
        answers.append((response.status_code, response.json()["detail"].replace(path, "<path>")))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    "path", ["/v1/jobs/%00", "/v1/jobs?model=%00", "/v1/jobs/x/events?after=1e9", "/v1/jobs?cursor=%FF"]
)
def test_strange_addresses_are_problems_and_not_crashes(client: httpx.Client, path: str):
    response = client.get(path)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.status_code in {404, 422}


def test_answers_are_never_sniffed_or_run(client: httpx.Client):
    assert client.get("/v1/jobs").headers["x-content-type-options"] == "nosniff"
    assert "server" not in client.get("/v1/jobs").headers or "python" not in client.get("/v1/jobs").headers["server"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("onnx/model.onnx", "model.onnx"),
        ('a"; filename="evil.exe', "a___filename__evil.exe"),
        ("x\r\nSet-Cookie: a", "x__Set-Cookie__a"),
        (".bashrc", "bashrc"),
        ("модель.bin", "______.bin"),
        ("..", "file"),
    ],
)
def test_a_downloads_name_is_harmless(path: str, name: str):
    assert safe_filename(path) == name


_MERGED = ["a0: &a0 {x: 1}", *(f"a{at}: &a{at} {{<<: [{', '.join([f'*a{at - 1}'] * 9)}]}}" for at in range(1, 8))]


@pytest.mark.parametrize(
    ("lines", "said"),
    [(_MERGED, "aliases"), ([f"a{number}: 1" for number in range(6500)], "6501 faults")],
    ids=["merge keys", "as many entries as fit"],
)
@pytest.mark.slow
def test_yaml_that_takes_long_holds_up_nobody(client: httpx.Client, api: RunningApi, lines: list[str], said: str):
    """Nested merge keys grow ninefold with each level. 434 bytes of them once took 5.8 s, and eight such requests at a time 54 s.

    A text with as many entries as fit takes 50 ms. Eight at a time once kept all threads for SQL, and others waited for 3 s.
    """
    bomb = {"recipe": "\n".join(lines)}
    waits: list[float] = []
    with ThreadPoolExecutor(8) as threads, api.client() as other:
        sent = [threads.submit(client.post, "/v1/recipes/validate", json=bomb) for _ in range(64)]
        while not all(answer.done() for answer in sent):
            began = time.monotonic()
            assert other.get("/v1/me").status_code == 200
            waits.append(time.monotonic() - began)
    assert {answer.result().status_code for answer in sent} == {422}
    assert said in sent[0].result().json()["detail"]
    assert max(waits, default=0) < 5 * slowness()


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "x", "evaluate": [{"metric": {}}], "passes": [], "exports": ["onnx"]},
        {"name": "x", "description": "\ud800", "target": "auto"},
        {"name": "x", "target": [[[[]]]]},
        {"name": "x", "gates": {"size": "<= ²%"}, "target": "auto"},
        {"name": "x", "passes": [{"pass": "magnitude", "pattern": "²:4"}], "exports": ["onnx"]},
        {"name": "x", "passes": [{"pass": "magnitude", "pattern": "9" * 5000 + ":4"}], "exports": ["onnx"]},
        {"name": "x", "passes": [{"pass": "distill", "student": {"config": {"hidden_size": "x"}}}], "exports": ["safetensors"]},
        {"name": "x", "passes": [{"pass": "distill", "student": {"config": {"num_attention_heads": 0}}}], "exports": ["safetensors"]},
    ],
)  # fmt: skip
def test_a_strange_recipe_is_refused_for_a_model(client: httpx.Client, recipe: dict[str, object]):
    for path, body in (
        ("/v1/recipes/validate", {"model": "tiny", "recipe": recipe}),
        ("/v1/jobs", {"model": "tiny", "recipe": recipe}),
    ):
        response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert response.status_code == 422, response.text
        assert response.json()["hint"]


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("deep", b'{"model":"tiny","recipe":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}"),
        ("deeper than JSON is read", b"[" * 100_000),
        ("many values", b'{"model":"tiny","recipe":{"a":[' + b"[]," * 300_000 + b"[]]}}"),
        ("many keys", b'{"model":"tiny","labels":{' + b",".join(b'"%d":1' % at for at in range(90_000)) + b"}}"),
        ("half a surrogate pair", b'{"model":"\\ud800","recipe":"int8-encoder"}'),
        ("half a surrogate pair in a key", b'{"model":"tiny","recipe":{"\\udc00":1}}'),
        ("a long number", b'{"model":"tiny","recipe":"int8-encoder","priority":' + b"9" * 100_000 + b"}"),
        ("UTF-16", '{"model":"tiny","recipe":"int8-encoder","x":1}'.encode("utf-16")),
    ],
)
def test_a_body_that_no_client_writes_is_refused_at_once(client: httpx.Client, what: str, body: bytes):
    response = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422, what
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) < 50_000


@pytest.mark.parametrize("value", ["²", "٣".encode().decode("latin-1"), "9" * 5000, "-1", "+1", "1e3"])
def test_headers_that_hold_no_number_are_refused(client: httpx.Client, value: str):
    asked = Request({"type": "http", "headers": [(b"last-event-id", value.encode("latin-1"))]})
    with pytest.raises(NightpressError, match="Last-Event-ID"):
        resume_point(asked, 0)
    headers = {"Accept": "text/event-stream", "Last-Event-ID": value.encode("latin-1")}
    assert client.get("/v1/jobs/x/events", headers=headers).status_code == 404


@pytest.mark.parametrize(
    "cursor",
    [
        base64.urlsafe_b64encode(raw).decode()
        for raw in (
            b"[" * 300,
            b'["0001-01-01T00:00:00+14:00", "x"]',
            b'["9999-12-31T23:59:59-14:00", "x"]',
            b'["2026-01-01T00:00:00+00:00", "\\ud800"]',
            b'["2026-01-01T00:00:00+00:00", 1]',
            b"null",
        )
    ],
)
def test_cursors_that_are_none_of_ours_are_refused(client: httpx.Client, cursor: str):
    assert client.get("/v1/jobs", params={"cursor": cursor}).status_code == 422


@pytest.mark.parametrize(
    ("name", "data", "status"),
    [
        ("a.csv", "text,label\nhello,²\n".encode(), 200),
        ("a.csv", "text,label\nhello,٣\n".encode(), 200),
        ("a.csv", b"text,label\nhello," + b"9" * 5000 + b"\n", 422),
        ("a.jsonl", b'{"text":"a","label":' + b"9" * 5000 + b"}\n", 422),
        ("a.jsonl", b"[" * 900_000 + b"\n", 422),
        ("a.jsonl", b'{"text":"\\ud800"}\n', 422),
        ("a.txt.gz", b"\x1f\x8b\x08\xff" + b"x" * 50, 422),
        ("a.parquet", b"PAR1PAR1", 422),
    ],
)
def test_a_data_set_is_decided_whatever_it_holds(client: httpx.Client, name: str, data: bytes, status: int):
    file = {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    made = client.post("/v1/datasets", json={"name": "d", "file": file}).json()
    client.put(f"/v1/datasets/{made['id']}/parts/1", params={"path": name}, content=data).raise_for_status()
    assert client.post(f"/v1/datasets/{made['id']}/complete").status_code == status
    assert client.get(f"/v1/datasets/{made['id']}").json()["state"] == ("ready" if status == 200 else "failed")
