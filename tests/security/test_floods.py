"""S9: hundreds of requests at once, with and without the limiter's server, and without the quotas' database."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from nightpress import migrations
from nightpress.api.deps import Services
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.servers import Postgres, Valkey

JOB = {"model": "tiny", "recipe": "int8-encoder", "reuse": False}
NOBODY = "redis://127.0.0.1:1/0"
FLOOD = 300


def flood(api: RunningApi, *, at_once: int = 40) -> list[httpx.Response]:
    """Submit FLOOD jobs with one key, over `at_once` connections. Returns the answers."""
    key = api.key()

    async def send() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=at_once)
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(
            base_url=api.url, headers=headers, timeout=60, trust_env=False, limits=limits
        ) as client:
            return await asyncio.gather(*(client.post("/v1/jobs", json=JOB) for _ in range(FLOOD)))

    return asyncio.run(send())


def settings_of(folder: Path, model: Path, **more: Any) -> Settings:
    return Settings(_env_file=None, data_dir=folder, model_roots=[model.parent], **more)


def bring(api: RunningApi, model: Path) -> None:
    with api.client() as client:
        client.post("/v1/models", json={"name": "tiny", "path": str(model)}).raise_for_status()


def queued(services: Services) -> int:
    return services.resources.quotas.usage("default").queued_jobs


@pytest.mark.slow
def test_a_flood_is_refused_but_for_what_the_key_may_and_each_refusal_says_when_to_come_back(
    tmp_path: Path, sqlite_url: str, valkey_server: Valkey, bert_tiny: Path
):
    limit = 60
    settings = settings_of(
        tmp_path, bert_tiny, database_url=sqlite_url, broker_url=valkey_server.url, rate_limit_per_minute=limit
    )
    with serve(settings) as api:
        bring(api, bert_tiny)
        began = time.monotonic()
        answers = flood(api)
        refilled = int((time.monotonic() - began) * limit / 60) + 1
        taken = [answer for answer in answers if answer.status_code == 201]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(taken) + len(refused) == FLOOD
        assert limit <= len(taken) <= limit + refilled
        assert queued(api.services) == len(taken)
        assert {answer.json()["code"] for answer in refused} == {"rate_limited"}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        for answer in answers:
            assert answer.headers["ratelimit-limit"] == str(limit)
            assert int(answer.headers["ratelimit-remaining"]) < limit
            assert 0 <= int(answer.headers["ratelimit-reset"]) <= 60


@pytest.mark.slow
def test_without_the_limiters_server_all_pass_up_to_the_quota(tmp_path: Path, sqlite_url: str, bert_tiny: Path):
    settings = settings_of(
        tmp_path, bert_tiny, database_url=sqlite_url, broker_url=NOBODY, rate_limit_per_minute=5, max_queued_jobs=20
    )
    with serve(settings) as api:
        bring(api, bert_tiny)
        answers = flood(api)
        assert [answer.status_code for answer in answers].count(201) == 20 == queued(api.services)
        assert {answer.json()["code"] for answer in answers if answer.status_code != 201} == {"quota_exceeded"}
        assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)


@pytest.mark.slow
def test_without_the_quotas_database_nobody_passes(tmp_path: Path, bert_tiny: Path):
    with Postgres(tmp_path / "postgres") as postgres:
        url = postgres.create_database()
        migrations.upgrade(url)
        settings = settings_of(tmp_path, bert_tiny, database_url=url, broker_url=NOBODY, rate_limit_per_minute=5)
        with serve(settings) as api, api.client() as client:
            bring(api, bert_tiny)
            assert client.post("/v1/jobs", json=JOB).status_code == 201  # the API caches the key and its quotas
            postgres.stop()
            refused = client.post("/v1/jobs", json=JOB)
            assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
            assert int(refused.headers["retry-after"]) > 0
            postgres.start()
            assert client.get("/v1/me").json()["usage"]["queued_jobs"] == 1
