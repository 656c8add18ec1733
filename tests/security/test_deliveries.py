"""Deliveries: where they may connect to, and who gets to know a credential."""

import ipaddress
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from nightpress import migrations
from nightpress.core.database import transaction
from nightpress.core.service.deliveries.guarded import guarded_client
from nightpress.core.settings import Settings
from tests.api import serve
from tests.databases import migrated_sqlite
from tests.deliveries import LOOPBACK, World
from tests.hub import Hub, serve_hub

SECRET = "hf_never_to_be_seen"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def world(tmp_path: Path, hub: Hub) -> Iterator[World]:
    world = World(
        tmp_path, migrated_sqlite(tmp_path / "nightpress.db"), destinations=["hf://acme"], hub_endpoint=hub.url
    )
    world.credentials("hf://acme", token=SECRET)
    yield world
    world.close()


@pytest.mark.slow
def test_a_client_reaches_only_addresses_that_were_checked(hub: Hub) -> None:
    port = httpx.URL(hub.url).port
    asked: list[str] = []
    answers = {
        "inside.example.com": ["127.0.0.1"],
        "public.example.com": ["93.184.216.34"],
        "both.example.com": ["127.0.0.1", "169.254.169.254"],
    }

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return answers.get(host, [host])

    def fault(url: str, networks: list[ipaddress.IPv4Network]) -> str:
        client = guarded_client(networks, timeout=httpx.Timeout(2), resolve=resolve)
        with client, pytest.raises(httpx.ConnectError) as refused:
            client.get(url)
        return str(refused.value)

    for url in (hub.url, f"http://inside.example.com:{port}/", "http://169.254.169.254/", "https://[::1]/"):
        assert "private or reserved" in fault(url, []), url
    assert "by https" in fault("http://public.example.com/", [LOOPBACK])
    assert "private or reserved" in fault(f"http://both.example.com:{port}/", [LOOPBACK])
    assert hub.asked == []
    asked.clear()
    with guarded_client([LOOPBACK], timeout=httpx.Timeout(5), resolve=resolve) as client:
        hub.push("models/acme/x", {"a": b"1"})
        answer = client.get(f"http://inside.example.com:{port}/api/models/acme/x/revision/main")
    # One look-up for one request: the connection used its answer, and the server was told the name.
    assert (answer.status_code, asked) == (200, ["inside.example.com"])
    assert hub.asked[-1][1]["host"] == f"inside.example.com:{port}"


@pytest.mark.slow
def test_a_hub_that_sends_uploads_inside_is_refused(world: World, hub: Hub) -> None:
    hub.writes.uploads_at = "http://169.254.169.254"
    world.accept(destinations=["hf://acme/x"])
    tried = world.run()
    assert tried.error is not None
    assert "private or reserved" in tried.error["message"]
    assert hub.writes.commits == []


def test_a_token_goes_to_no_other_host(world: World, hub: Hub) -> None:
    with serve_hub() as store:
        store.writes.lfs = hub.writes.lfs  # the store and the Hub have the same objects
        hub.writes.uploads_at = store.url
        world.accept(destinations=["hf://acme/x"])
        assert world.run().state == "delivered"
        assert len(store.asked) == 1
        assert "authorization" not in store.asked[0][1]
    assert any(headers.get("authorization") == f"Bearer {SECRET}" for _, headers in hub.asked)


@pytest.mark.slow
def test_no_answer_row_or_log_holds_a_secret(tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(
        _env_file=None,
        data_dir=tmp_path / "np",
        destinations=["hf://acme"],
        hub_endpoint=hub.url,
        destination_networks=[LOOPBACK],
    )
    migrations.upgrade(settings.sql_url)
    hub.writes.tokens = {"another"}
    said = []
    with caplog.at_level(logging.DEBUG), serve(settings) as api, api.client() as client:
        body = {"prefix": "hf://acme", "secrets": {"token": SECRET}}
        made = client.post("/v1/credentials", json=body)
        path = f"/v1/credentials/{made.json()['id']}"
        said += [made, client.get("/v1/credentials"), client.get(path)]
        said += [client.post(f"{path}/rotate", json={"secrets": {"token": SECRET}})]
        assert all(answer.is_success for answer in said)
        # Also where the request is refused: a problem names the fields, not their values.
        for wrong in ({"prefix": "s3://x", "secrets": {"token": SECRET}}, {**body, "more": SECRET}, body):
            said.append(client.post("/v1/credentials", json=wrong))
        assert [answer.status_code for answer in said[-3:]] == [422, 422, 409]
        with transaction(api.services.resources.engine, read_only=True) as connection:
            tables = connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'table'")).scalars().all()
            rows = [str(connection.execute(text(f'SELECT * FROM "{table}"')).all()) for table in tables]
            audit = connection.execute(text("SELECT action FROM audit_log ORDER BY at")).scalars().all()
    assert audit == ["POST /v1/credentials", "POST /v1/credentials/{credential_id}/rotate"]
    assert not [answer.text for answer in said if SECRET in answer.text]
    assert not [row for row in rows if SECRET in row]
    assert SECRET not in caplog.text
