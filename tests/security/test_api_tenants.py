"""S6, S8, S15: every route of the OpenAPI document, called by other tenants, with keys of other scopes, and without a key."""

import datetime as dt
import hashlib
import json
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from nightpress import migrations
from nightpress.core.service.access.keys import ALL_SCOPES, create_key, revoke
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.operations import BODIES, OPEN, on_things, operations
from tests.owned import S3_KEY, Owned, give


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, bert_tiny: Path) -> Iterator[RunningApi]:
    folder = tmp_path_factory.mktemp("tenants")
    (folder / "data.txt").write_text("A line of prose.\n" * 50)
    settings = Settings(
        data_dir=folder / "np",
        broker_url="redis://127.0.0.1:1/0",
        model_roots=[bert_tiny.parent, folder],
        webhook_networks=["127.0.0.0/8"],
        destinations=["s3://models"],
    )
    migrations.upgrade(settings.sql_url)
    with serve(settings) as running:
        yield running


@pytest.fixture(scope="module")
def owner(api: RunningApi) -> Iterator[httpx.Client]:
    with api.client(tenant_id="first") as client:
        yield client


@pytest.fixture(scope="module")
def stranger(api: RunningApi) -> Iterator[httpx.Client]:
    with api.client(tenant_id="second") as client:
        yield client


@pytest.fixture(scope="module")
def owned(api: RunningApi, owner: httpx.Client, bert_tiny: Path) -> Owned:
    return give(api, owner, bert_tiny)


def told(response: httpx.Response, identifier: str) -> dict[str, Any]:
    """An answer's body without the parts that differ between two requests."""
    body = json.loads(response.text.replace(identifier, "<id>"))
    body.pop("request_id")
    return body


@pytest.mark.slow
def test_another_tenants_thing_is_as_missing_as_one_that_never_was(
    api: RunningApi, owner: httpx.Client, stranger: httpx.Client, owned: Owned
):
    for operation in on_things(api):
        real = getattr(owned, operation.kind)
        never = f"{real.split('_')[0]}_{'0' * 26}" if "_" in real else "0" * len(real)
        for headers in ({}, {"Accept": "text/event-stream"}):
            theirs = operation.send(stranger, real, headers=headers)
            nobodys = operation.send(stranger, never, headers=headers)
            assert (theirs.status_code, nobodys.status_code) == (404, 404), operation
            assert told(theirs, real) == told(nobodys, never), operation
            assert "secret" not in theirs.text
    # None of these requests changed anything: every GET route still works for the owner.
    for operation in on_things(api):
        if operation.method == "GET" and not operation.path.endswith(("/uploads", "/{delivery_id}")):
            assert operation.send(owner, getattr(owned, operation.kind)).status_code == 200, operation


def test_another_tenants_names_mean_nothing(stranger: httpx.Client, owned: Owned):
    for model in (owned.models, "tiny"):
        response = stranger.post("/v1/jobs", json={"model": model, "recipe": "int8-encoder"})
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
        checked = stranger.post("/v1/recipes/validate", json={"recipe": "name: x", "model": model})
        assert checked.status_code in {404, 422}
        assert "bert" not in checked.text
    assert stranger.get("/v1/models/tiny").status_code == 404
    assert stranger.get("/v1/datasets/prose").status_code == 404


def test_lists_hold_ones_own_alone(stranger: httpx.Client, owned: Owned):
    for path in (path for path in BODIES if "{" not in path):
        listed = stranger.get(path).text
        assert not any(identifier in listed for identifier in owned), path


@pytest.mark.slow
def test_without_a_key_every_route_is_closed(api: RunningApi):
    with httpx.Client(base_url=api.url, trust_env=False) as nobody:
        for operation in operations(api):
            response = operation.send(nobody, "job_x")
            if operation.path in OPEN:
                assert response.status_code == 200, operation
                continue
            assert (response.status_code, response.json()["code"]) == (401, "unauthenticated"), operation
            assert response.headers["www-authenticate"].startswith("Bearer"), operation


@pytest.mark.slow
def test_an_expired_revoked_or_invented_key_opens_no_route(api: RunningApi):
    engine = api.services.resources.engine
    over = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    _, expired = create_key(engine, tenant_id="first", name="k", scopes=ALL_SCOPES, expires_at=over)
    record, revoked = create_key(engine, tenant_id="first", name="k", scopes=ALL_SCOPES)
    assert revoke(engine, record.id)
    invented = f"{expired[:12]}{secrets.token_urlsafe(32)}{expired[-6:]}"
    with httpx.Client(base_url=api.url, trust_env=False) as client:
        for operation in (operation for operation in operations(api) if operation.path not in OPEN):
            for key in (expired, revoked, invented):
                answer = operation.send(client, "job_x", headers={"Authorization": f"Bearer {key}"})
                assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), operation


@pytest.mark.slow
def test_each_route_takes_exactly_one_scope_and_only_reading_scopes_for_reading(api: RunningApi):
    scopes = sorted(ALL_SCOPES - {"admin"})
    clients = {scope: api.client(tenant_id="scoped", scopes=[scope]) for scope in scopes}
    try:
        for operation in operations(api):
            if operation.path in OPEN | {"/v1/me"}:
                continue
            if operation.path.startswith("/v1/admin"):
                continue
            answers = {scope: operation.send(client, "missing") for scope, client in clients.items()}
            allowed = [
                scope for scope, answer in answers.items() if answer.is_success or answer.json()["code"] != "forbidden"
            ]
            assert len(allowed) == 1, (operation, allowed)
            (scope,) = allowed
            if operation.path.startswith("/v1/keys"):
                assert scope.startswith("keys:"), operation
            reads = operation.method == "GET" and not operation.path.endswith("/uploads")
            assert scope.endswith(":read") == (reads or operation.path.endswith("/validate")), (operation, scope)
    finally:
        for client in clients.values():
            client.close()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/datasets", "/v1/jobs"])
def test_a_reading_key_creates_nothing(api: RunningApi, path: str):
    with api.client(scopes=["jobs:read", "models:read", "workers:read"]) as reader:
        response = reader.post(
            path, json={"name": "x", "path": "/x"} if path != "/v1/jobs" else {"model": "x", "recipe": "x"}
        )
        assert (response.status_code, response.json()["code"]) == (403, "forbidden")
        assert "scope" in response.json()["detail"]
        assert reader.get(path).status_code == 200


def test_a_key_is_good_only_whole_in_its_header_and_until_it_is_revoked(api: RunningApi):
    record, key = create_key(api.services.resources.engine, tenant_id="first", name="k", scopes=["jobs:read"])
    with httpx.Client(base_url=api.url, trust_env=False) as client:

        def status(value: str) -> int:
            return client.get("/v1/jobs", headers={"Authorization": value}).status_code

        assert status(f"Bearer {key}") == 200
        assert status(f"bearer {key}") == 200
        other = key[:-7] + ("a" if key[-7] != "a" else "b") + key[-6:]
        for wrong in (
            key,
            f"Basic {key}",
            "Bearer",
            f"Bearer {key[:-1]}",
            f"Bearer {other}",
            f"Bearer {key}x",
        ):
            assert status(wrong) == 401, wrong
        assert client.get("/v1/jobs", params={"key": key, "authorization": f"Bearer {key}"}).status_code == 401
        assert revoke(api.services.resources.engine, record.id)
        api.services.resources.keys._known.clear()  # five seconds later the cache would have expired
        assert status(f"Bearer {key}") == 401


def test_no_answer_tells_the_key(api: RunningApi, owned: Owned):
    key = api.key(tenant_id="first")
    with httpx.Client(base_url=api.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as client:
        for path in ("/v1/me", "/v1/jobs", "/v1/nothing", "/metrics", "/readyz"):
            assert key.split("_", 2)[2] not in client.get(path).text


@pytest.mark.slow
def test_figures_are_for_who_may_read_them_where_the_operator_says_so(tmp_path: Path):
    settings = Settings(data_dir=tmp_path, broker_url="redis://127.0.0.1:1/0", metrics_access="key")
    migrations.upgrade(settings.sql_url)
    with serve(settings) as closed:
        assert httpx.get(f"{closed.url}/metrics", trust_env=False).status_code == 401
        for scopes, status in (["jobs:read"], 403), (["metrics:read"], 200):
            with closed.client(scopes=scopes) as client:
                assert client.get("/metrics").status_code == status


def test_an_idempotency_key_belongs_to_its_tenant(
    owner: httpx.Client, stranger: httpx.Client, owned: Owned, bert_tiny: Path
):
    stranger.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)}).raise_for_status()
    body, headers = {"model": "tiny", "recipe": "int8-encoder"}, {"Idempotency-Key": "guessed"}
    first = owner.post("/v1/jobs", json=body, headers=headers)
    second = stranger.post("/v1/jobs", json=body, headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]
    assert (
        owner.post("/v1/jobs", json={**body, "priority": 2}, headers=headers).json()["code"] == "idempotency_mismatch"
    )


#: path → a body with which the POST succeeds, where that of BODIES doesn't
DONE: dict[str, Any] = {
    "/v1/credentials": {"prefix": "hf://once", "secrets": {"token": "hf_secret"}},
    "/v1/jobs": {"model": "tiny", "recipe": "int8-encoder"},
    "/v1/jobs:batch": {"jobs": [{"model": "tiny", "recipe": "int8-encoder", "name": "one of a batch"}]},
    "/v1/webhooks": {"url": "http://127.0.0.1:1/", "events": ["job.failed"]},
    "/v1/studies": {"model": "tiny", "gates": {"cosine": ">= 0.9"}},
    "/v1/schedules": {"name": "once", "cron": "0 2 * * *", "job": {"model": "tiny", "recipe": "int8-encoder"}},
    "/v1/keys": {"name": "other", "scopes": ["jobs:read"]},
}


@pytest.mark.slow
def test_every_post_under_a_key_is_done_once_and_answered_alike(
    api: RunningApi, owner: httpx.Client, owned: Owned, bert_tiny: Path
):
    data_file = api.services.resources.settings.data_dir.parent / "data.txt"
    bodies = DONE | {
        "/v1/models": {"name": "once", "path": str(bert_tiny)},
        "/v1/datasets": {"name": "once", "path": str(data_file)},
        "/v1/models/{reference}/promotions": {"job_id": owned.jobs},
        "/v1/deliveries": {"job_id": owned.jobs, "destinations": ["s3://models/once"]},
        "/v1/credentials/{credential_id}/rotate": {"secrets": S3_KEY},
        "/v1/recipes/validate": {"recipe": "int8-encoder", "model": "tiny"},
    }
    document = httpx.get(f"{api.url}/openapi.json", trust_env=False).json()
    done = 0
    for operation in operations(api):
        if operation.method != "POST":
            continue
        named = [parameter["name"] for parameter in document["paths"][operation.path]["post"]["parameters"]]
        assert named.count("Idempotency-Key") == 1, operation
        path = operation.at(getattr(owned, operation.kind, ""))
        body = bodies.get(operation.path, BODIES.get(operation.path))
        headers = {"Idempotency-Key": f"once {operation.path}".replace(" ", "-")}
        first, second = (owner.post(path, json=body, headers=headers) for _ in range(2))
        other = owner.post(path, json={**(body or {}), "more": 1}, headers=headers)
        if first.is_error:  # it changed nothing, so a corrected request may use the same idempotency key
            assert second.status_code == first.status_code, operation
            assert other.json()["code"] != "idempotency_mismatch", operation
            continue
        done += 1
        if operation.path == "/v1/jobs":
            assert (second.status_code, second.json()["id"]) == (200, first.json()["id"])
            other = owner.post(path, json={**body, "priority": 1}, headers=headers)
        elif "no-store" in first.headers.get("cache-control", ""):
            assert (second.status_code, second.json()["code"]) == (409, "conflict"), operation
            assert "np_" not in second.text
            assert "whsec_" not in second.text
        else:
            assert (second.status_code, second.content) == (first.status_code, first.content), operation
            assert second.headers["idempotency-replayed"] == "true"
            assert second.headers.get("location") == first.headers.get("location")
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch"), operation
    assert done >= 15
    for path, name in (("/v1/models", "once"), ("/v1/datasets", "once"), ("/v1/jobs", "one of a batch")):
        assert [item["name"] for item in owner.get(path).json()["items"]].count(name) == 1
    taken = {"Idempotency-Key": "once-/v1/webhooks"}
    assert owner.post("/v1/jobs", json=DONE["/v1/jobs"], headers=taken).json()["code"] == "idempotency_mismatch"
    taken = {"Idempotency-Key": "once-/v1/jobs"}
    assert owner.post("/v1/webhooks", json=DONE["/v1/webhooks"], headers=taken).json()["code"] == "idempotency_mismatch"
    for bad in ("a b", "x" * 256, ""):
        answer = owner.post("/v1/webhooks", json=DONE["/v1/webhooks"], headers={"Idempotency-Key": bad})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), bad


def test_a_key_that_may_do_less_is_not_told_what_another_was_answered(
    api: RunningApi, owner: httpx.Client, owned: Owned
):
    headers, body = {"Idempotency-Key": "mine"}, DONE["/v1/schedules"] | {"name": "mine"}
    assert owner.post("/v1/schedules", json=body, headers=headers).status_code == 201
    with api.client(tenant_id="first", scopes=["models:read"]) as lesser, api.client(tenant_id="second") as stranger:
        refused = lesser.post("/v1/schedules", json=body, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_mismatch")
        assert "mine" not in refused.json()["detail"]
        assert stranger.post("/v1/schedules", json=body, headers=headers).status_code == 201


def test_at_the_same_moment_one_is_done_and_the_others_wait_or_are_told(
    api: RunningApi, owner: httpx.Client, owned: Owned, bert_tiny: Path
):
    body, headers = {"name": "at-once", "path": str(bert_tiny)}, {"Idempotency-Key": "at-once"}

    def send(_: int) -> tuple[int, str]:
        answer = owner.post("/v1/models", json=body, headers=headers)
        return answer.status_code, answer.json().get("id") or answer.headers["retry-after"]

    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(send, range(8)))
    assert {status for status, _ in answers} <= {201, 409}
    assert len({told for status, told in answers if status == 201}) == 1
    assert [item["name"] for item in owner.get("/v1/models").json()["items"]].count("at-once") == 1


def test_a_dump_of_the_database_holds_no_key(api: RunningApi):
    key = api.key()
    database = Path(api.services.resources.settings.sql_url.removeprefix("sqlite:///"))
    stored = b"".join(path.read_bytes() for path in database.parent.glob(database.name + "*"))
    assert hashlib.sha256(key.encode()).hexdigest().encode() in stored
    assert key.split("_", 2)[2].encode() not in stored


def test_only_an_administrator_reaches_what_is_of_all_tenants(api: RunningApi):
    others = api.client(tenant_id="scoped", scopes=sorted(ALL_SCOPES - {"admin"}))
    admins = api.client(tenant_id="operator", scopes=["admin"])
    with others as other, admins as admin:
        tried = [operation for operation in operations(api) if operation.path.startswith("/v1/admin")]
        assert len(tried) >= 4
        for operation in tried:
            refused = operation.send(other, "first")
            assert (refused.status_code, refused.json()["code"]) == (403, "forbidden"), operation
            assert operation.send(admin, "first").status_code == 200, operation
        assert other.get("/v1/keys", params={"tenant_id": "first"}).json()["code"] == "forbidden"
        assert admin.get("/v1/keys", params={"tenant_id": "first"}).json()["items"]


def test_a_key_gives_away_no_more_than_it_has(api: RunningApi):
    strong, _ = create_key(
        api.services.resources.engine, tenant_id="givers", name="strong", scopes=["admin", "jobs:write"]
    )
    with api.client(tenant_id="givers", scopes=["keys:read", "keys:write", "jobs:read"]) as giver:
        for scopes in (["admin"], ["jobs:read", "models:write"]):
            refused = giver.post("/v1/keys", json={"name": "x", "scopes": scopes})
            assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert giver.post("/v1/keys", json={"name": "x", "scopes": ["root"]}).status_code in {403, 422}
        assert (
            giver.post("/v1/keys", json={"name": "x", "scopes": ["jobs:read"], "tenant_id": "first"}).status_code == 403
        )
        for refused in (giver.post(f"/v1/keys/{strong.id}/rotate"), giver.delete(f"/v1/keys/{strong.id}")):
            assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        made = giver.post("/v1/keys", json={"name": "x", "scopes": ["jobs:read"]})
        assert (made.status_code, made.json()["record"]["tenant_id"]) == (201, "givers")
        assert made.headers["cache-control"] == "no-store"
        listed = giver.get("/v1/keys").text
        assert made.json()["key"].split("_", 2)[2] not in listed
        assert "digest" not in listed
