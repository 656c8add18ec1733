"""Uploads whose clients stop sending: for a while they use up their own tenant's slots, but no other tenant's."""

import contextlib
import hashlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nightpress.api import admission
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.patience import slowness

PATIENCE_S = 4.0
PIECE = b"a" * 200_000


@pytest.fixture
def api(tmp_path: Path, sqlite_url: str) -> Iterator[RunningApi]:
    settings = Settings(
        _env_file=None,
        data_dir=tmp_path,
        database_url=sqlite_url,
        broker_url="redis://127.0.0.1:1/0",
        api_client_patience_s=PATIENCE_S,
    )
    with serve(settings) as running:
        yield running


def announce(client: httpx.Client, name: str) -> dict[str, Any]:
    file = {"path": "a.txt", "size": len(PIECE), "sha256": hashlib.sha256(PIECE).hexdigest()}
    made: dict[str, Any] = client.post("/v1/datasets", json={"name": name, "file": file}).raise_for_status().json()
    return made


def fall_silent(api: RunningApi, key: str, data_set: dict[str, Any]) -> socket.socket:
    """Send the head and the first byte of a part, and no more. Returns the open connection."""
    host, _, port = api.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = (
        f"PUT {data_set['uploads'][0]['parts'][0]['url']} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(PIECE)}\r\n\r\n"
    )
    connection.sendall(head.encode() + b"a")
    return connection


@pytest.mark.slow
def test_silent_uploads_hold_up_neither_other_tenants_nor_other_requests_and_end(api: RunningApi):
    key = api.key()
    with api.client() as mine, api.client(tenant_id="another") as other, contextlib.ExitStack() as open_ones:
        begun = announce(mine, "slow")
        spare = announce(mine, "spare")
        silent = [open_ones.enter_context(fall_silent(api, key, begun)) for _ in range(2 * admission.UPLOADS_A_TENANT)]
        time.sleep(0.5)
        began = time.monotonic()
        whole = announce(other, "whole")
        url = whole["uploads"][0]["parts"][0]["url"]
        assert other.put(url, content=PIECE).status_code == 204
        assert other.post(f"/v1/datasets/{whole['id']}/complete").status_code == 200
        assert mine.delete(f"/v1/datasets/{spare['id']}").status_code == 204
        assert time.monotonic() - began < 2 * slowness()
        for connection in silent:
            with contextlib.suppress(ConnectionError):
                while connection.recv(65536):
                    pass
        assert time.monotonic() - began < 3 * PATIENCE_S * slowness()
        assert mine.put(begun["uploads"][0]["parts"][0]["url"], content=PIECE).status_code == 204


@pytest.mark.slow
def test_whoever_waits_too_long_for_a_place_is_told_when_to_come_again(api: RunningApi):
    key = api.key()
    api.services.admission._patience_s = 0.5
    with api.client() as client, contextlib.ExitStack() as open_ones:
        begun = announce(client, "slow")
        for _ in range(admission.UPLOADS_A_KEY):
            open_ones.enter_context(fall_silent(api, key, begun))
        time.sleep(0.5)
        headers = {"Authorization": f"Bearer {key}"}
        refused = client.put(begun["uploads"][0]["parts"][0]["url"], content=PIECE, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert int(refused.headers["retry-after"]) > 0
        with api.client() as another_key:
            assert another_key.put(begun["uploads"][0]["parts"][0]["url"], content=PIECE).status_code == 204
