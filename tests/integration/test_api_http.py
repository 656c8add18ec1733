"""What holds for every route: problems, request ids, health, metrics, the OpenAPI document; and the cost of importing the API."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openapi_spec_validator import validate

from nightpress import migrations
from nightpress.api.app import create_app
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.servers import Postgres, Valkey


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, valkey_server: Valkey) -> Iterator[RunningApi]:
    folder = tmp_path_factory.mktemp("api")
    settings = Settings(data_dir=folder, broker_url=valkey_server.url)
    migrations.upgrade(settings.sql_url)
    with serve(settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(api: RunningApi) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


def is_problem(response: httpx.Response, status: int, code: ErrorCode) -> bool:
    body = response.json()
    return (
        response.status_code == body["status"] == status
        and response.headers["content-type"] == "application/problem+json"
        and body["code"] == code.value
        and body["type"] == f"urn:nightpress:error:{code.value}"
        and bool(body["title"] and body["detail"])
        and body["request_id"] == response.headers["x-request-id"]
    )


@pytest.mark.slow
def test_an_unknown_address_is_a_problem(client: httpx.Client):
    assert is_problem(client.get("/v1/nothing"), 404, ErrorCode.NOT_FOUND)


def test_a_wrong_method_is_a_problem_that_names_the_right_ones(client: httpx.Client):
    response = client.patch("/v1/jobs")
    assert is_problem(response, 405, ErrorCode.INVALID_REQUEST)
    assert "GET" in response.headers["allow"] or "POST" in response.headers["allow"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "\\ud800", "recipe": "x"}',
        b'{"a":' * 900 + b"1" + b"}" * 900,
    ],
    ids=["empty", "cut", "list", "null", "text", "not UTF-8", "half a surrogate", "deep"],
)
def test_a_body_that_is_no_request_is_a_problem(client: httpx.Client, body: bytes):
    response = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert is_problem(response, response.status_code, ErrorCode.INVALID_REQUEST)
    assert response.status_code in {400, 422}


def test_faults_are_listed_with_their_place_and_without_the_input(client: httpx.Client):
    body = {"model": "m", "recipe": "r", "priority": "s3cret", "labels": {"bad key!": "x"}}
    response = client.post("/v1/jobs", json=body)
    assert is_problem(response, 422, ErrorCode.INVALID_REQUEST)
    assert {fault["at"] for fault in response.json()["errors"]} == {"body.priority", "body.labels.bad key!.[key]"}
    assert "s3cret" not in response.text


def test_a_wrong_query_is_a_problem(client: httpx.Client):
    assert is_problem(client.get("/v1/jobs", params={"state": "lost"}), 422, ErrorCode.INVALID_REQUEST)
    assert is_problem(client.get("/v1/jobs", params={"limit": 0}), 422, ErrorCode.INVALID_REQUEST)
    assert is_problem(client.get("/v1/jobs", params={"cursor": "bm9wZQ"}), 422, ErrorCode.INVALID_REQUEST)
    assert is_problem(client.get("/v1/jobs", params={"label": "novalue"}), 422, ErrorCode.INVALID_REQUEST)


def test_the_callers_request_id_comes_back_and_a_strange_one_is_replaced(client: httpx.Client):
    assert client.get("/healthz", headers={"X-Request-Id": "trace-1"}).headers["x-request-id"] == "trace-1"
    for strange in ("a b", "x" * 65, "<script>"):
        answered = client.get("/healthz", headers={"X-Request-Id": strange}).headers["x-request-id"]
        assert re.fullmatch("req_[0-9a-z]{26}", answered)


def test_it_is_ready_when_all_parts_answer(client: httpx.Client):
    response = client.get("/readyz")
    assert response.status_code == 200
    assert response.json()["status"] == "ok"
    assert response.json()["checks"] == {"database": "ok", "broker": "ok", "storage": "ok"}


@pytest.mark.slow
def test_without_its_broker_it_is_degraded_and_still_takes_requests(tmp_path: Path):
    settings = Settings(data_dir=tmp_path, broker_url="redis://127.0.0.1:1/0")
    migrations.upgrade(settings.sql_url)
    with serve(settings) as running, running.client() as client:
        response = client.get("/readyz")
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert response.json()["checks"]["broker"] != "ok"
        assert client.get("/v1/jobs").status_code == 200


@pytest.mark.slow
def test_without_its_storage_it_is_degraded(tmp_path: Path, valkey_server: Valkey):
    settings = Settings(data_dir=tmp_path, broker_url=valkey_server.url, storage_url=str(tmp_path / "objects"))
    migrations.upgrade(settings.sql_url)
    with serve(settings) as running, running.client() as client:
        blocked = tmp_path / "objects"
        if blocked.exists():
            for below in sorted(blocked.rglob("*"), reverse=True):
                below.rmdir() if below.is_dir() else below.unlink()
            blocked.rmdir()
        blocked.write_text("a file where the folder should be")
        response = client.get("/readyz")
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert response.json()["checks"]["storage"] != "ok"


@pytest.mark.parametrize("revision", ["", "0001"])
@pytest.mark.slow
def test_a_database_without_its_newest_tables_is_not_ready(tmp_path: Path, valkey_server: Valkey, revision: str):
    settings = Settings(data_dir=tmp_path, broker_url=valkey_server.url)
    if revision:
        migrations.upgrade(settings.sql_url, revision)
    with serve(settings) as running, httpx.Client(base_url=running.url) as client:
        response = client.get("/readyz")
        assert (response.status_code, response.json()["checks"]["database"]) == (503, "is not migrated")
        migrations.upgrade(settings.sql_url)
        assert client.get("/readyz").status_code == 200


@pytest.mark.slow
def test_without_its_database_it_is_unavailable_and_comes_back(tmp_path: Path, valkey_server: Valkey):
    with Postgres(tmp_path / "postgres") as postgres:
        url = postgres.create_database()
        migrations.upgrade(url)
        settings = Settings(data_dir=tmp_path, database_url=url, broker_url=valkey_server.url)
        with serve(settings) as running, running.client() as client:
            assert client.get("/readyz").json()["status"] == "ok"
            postgres.stop()
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
            assert client.get("/healthz").status_code == 200
            response = client.get("/v1/jobs")
            assert is_problem(response, 503, ErrorCode.DATABASE_UNAVAILABLE)
            assert int(response.headers["retry-after"]) > 0
            postgres.start()
            assert client.get("/v1/jobs").status_code == 200
            assert client.get("/readyz").json()["status"] == "ok"


def test_metrics_name_every_state_and_no_identifier(client: httpx.Client):
    client.get("/v1/jobs/job_000")
    text = client.get("/metrics").text
    assert 'nightpress_jobs{queue="cpu",state="queued"} 0.0' in text
    assert 'nightpress_queue_oldest_seconds{queue="gpu"} 0.0' in text
    assert 'nightpress_workers{queue="cpu",state="idle"} 0.0' in text
    assert 'nightpress_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"}' in text
    assert "nightpress_http_request_seconds_bucket" in text
    assert "job_000" not in text


@pytest.mark.slow
def test_the_document_is_valid_openapi_with_problems_and_examples(client: httpx.Client):
    document = client.get("/openapi.json").json()
    validate(document)
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            if path.startswith("/v1/"):
                assert operation["security"] == [{"ApiKey": []}], where
                assert {"401", "403", "503"} <= operation["responses"].keys(), where
            for status, answer in operation["responses"].items():
                if int(status) >= 400 and status != "416" and path != "/readyz":
                    assert "application/problem+json" in answer["content"], f"{where} {status}"
    post = document["paths"]["/v1/jobs"]["post"]
    assert len(post["requestBody"]["content"]["application/json"]["examples"]) == 2


def test_the_front_door_is_the_web_page_and_it_needs_nothing_from_elsewhere(client: httpx.Client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
        file = client.get(name)
        assert file.status_code == 200, name
        assert client.get(name, headers={"If-None-Match": file.headers["etag"]}).status_code == 304
    assert client.get("/static/../../../etc/passwd").status_code == 404
    assert client.get("/static/%2e%2e/%2e%2e/app.py").status_code == 404


def test_no_file_of_the_web_page_names_another_origin():
    allowed = {"http://www.w3.org/2000/svg"}
    for path in Path("api/pages/static").rglob("*.*"):
        assert set(re.findall(r"https?://[^\s\"'`)<>]+", path.read_text())) <= allowed, path


_LIBRARIES = "fastapi, sqlalchemy.dialects.postgresql, pydantic_settings, prometheus_client, yaml"
_HEAVY = {"torch", "numpy", "transformers", "boto3", "celery", "httpx", "httpcore", "rich"}


def cpu_s_of_import(modules: str) -> tuple[float, set[str]]:
    """The CPU seconds of a new interpreter that imports the modules, and the names of all modules that it loaded.

    It may store the bytecode of what it imports, so that from its second run on it compiles nothing: the libraries' was stored when they
    were installed, and without it ours would take a third longer.
    """
    code = (
        f"import json, resource, sys\nimport {modules}\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([used.ru_utime + used.ru_stime, list(sys.modules)]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    seconds, loaded = json.loads(run.stdout)
    return seconds, set(loaded)


@pytest.mark.slow
def test_importing_it_loads_nothing_heavy_and_adds_less_than_its_libraries_take():
    # Measured in turn, with the best time of each: other tests share this machine's cores.
    runs = [(cpu_s_of_import("nightpress.api.app"), cpu_s_of_import(_LIBRARIES)) for _ in range(3)]
    assert not runs[0][0][1] & _HEAVY
    assert min(ours for (ours, _), _ in runs) < 2.5 * min(theirs for _, (theirs, _) in runs)


def test_a_part_that_can_not_be_made_ends_the_api_when_it_starts(tmp_path: Path):
    """The error comes at the start, not at the first request that needs the part."""
    settings = Settings(_env_file=None, data_dir=tmp_path)
    (tmp_path / "secret").write_bytes(b"cut off")
    with pytest.raises(NightpressError, match="7 bytes"):
        create_app(settings)
