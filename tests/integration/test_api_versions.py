"""Optimistic locking: everything editable has an ETag, and an edit or deletion with an older ETag is refused."""

import ipaddress
from collections.abc import Iterator
from typing import Any

import pytest

from nightpress import migrations
from nightpress.core.service.access.keys import ALL_SCOPES
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve

#: path → (body that creates the thing; None if it always exists), and two changes
EDITED: dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = {
    "/v1/schedules/{reference}": (
        {"name": "nightly", "cron": "0 2 * * *", "job": {"model": "tiny", "recipe": "int8-encoder"}},
        {"overlap": "queue"},
        {"overlap": "replace"},
    ),
    "/v1/webhooks/{webhook_id}": (
        {"url": "http://127.0.0.1:9/", "events": ["job.failed"]},
        {"enabled": False},
        {"enabled": True},
    ),
    "/v1/admin/tenants/{tenant_id}": (None, {"max_queued_jobs": 3}, {"max_queued_jobs": 4}),
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    inside = [ipaddress.IPv4Network("127.0.0.0/8")]
    folder = tmp_path_factory.mktemp("versions")
    settings = Settings(data_dir=folder, broker_url="redis://127.0.0.1:1/0", webhook_networks=inside)
    migrations.upgrade(settings.sql_url)
    with serve(settings) as running:
        yield running


@pytest.mark.slow
def test_these_are_all_that_can_be_edited(api: RunningApi):
    with api.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert {path for path, methods in paths.items() if "patch" in methods} == EDITED.keys()
    for path in EDITED:
        for method in paths[path].keys() & {"patch", "delete"}:
            taken = {parameter["name"] for parameter in paths[path][method]["parameters"]}
            assert "if-match" in taken, f"{method} {path}"
            assert "412" in paths[path][method]["responses"], f"{method} {path}"


@pytest.mark.parametrize("path", EDITED)
def test_a_version_that_is_gone_is_neither_edited_nor_deleted(api: RunningApi, path: str):
    body, first, second = EDITED[path]
    listed = path.rpartition("/")[0]
    with api.client(tenant_id="editing", scopes=ALL_SCOPES) as client:
        there = f"{listed}/editing"
        if body is not None:
            made = client.post(listed, json=body)
            assert made.status_code == 201, made.text
            there = made.headers["location"]
        seen = client.get(there).headers["etag"]
        now = client.patch(there, json=first, headers={"If-Match": seen})
        assert now.status_code == 200, now.text
        assert now.headers["etag"] != seen
        writes = [("PATCH", second), ("DELETE", None)] if body is not None else [("PATCH", second)]
        for method, sent in writes:
            for stale in (seen, "nonsense"):
                refused = client.request(method, there, json=sent, headers={"If-Match": stale})
                assert (refused.status_code, refused.json()["code"]) == (412, "precondition_failed")
        assert client.get(there).headers["etag"] == now.headers["etag"]
        if body is not None:
            assert client.delete(there, headers={"If-Match": now.headers["etag"]}).status_code == 204
            assert client.delete(there, headers={"If-Match": now.headers["etag"]}).status_code == 404
