"""Passes of other packages over HTTP: refused where they aren't allowed, listed and planned where they are.

A job with such a pass never reuses a result that another version of the package made.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from nightpress.client import Client
from nightpress.core.errors import ErrorCode
from nightpress.core.recipes.passes import catalog
from nightpress.core.settings import Settings
from nightpress.worker.fitness import MachineFaultError
from nightpress.worker.recipes import read_recipe
from tests.api import RunningApi, serve
from tests.packages import OPTIONS, RECIPE, forget, install

JOB = {"model": "tiny", "recipe": RECIPE, "reuse": True}


@pytest.fixture(autouse=True)
def _nothing_allowed_afterwards() -> Iterator[None]:
    yield
    catalog.allow(())
    forget()


@contextmanager
def allowing(
    passes: list[str], sqlite_url: str, folder: Path, model: Path
) -> Iterator[tuple[RunningApi, httpx.Client]]:
    settings = Settings(
        _env_file=None,
        data_dir=folder / "np",
        database_url=sqlite_url,
        broker_url="redis://127.0.0.1:1/0",
        model_roots=[model.parent],
        passes=passes,
    )
    settings.data_dir.mkdir(exist_ok=True)
    with serve(settings) as api, api.client() as client:
        if not client.get("/v1/models").json()["items"]:
            assert client.post("/v1/models", json={"name": "tiny", "path": str(model)}).status_code == 201
        yield api, client


@pytest.mark.slow
def test_a_recipe_with_a_pass_that_is_not_allowed_is_refused_with_what_to_do(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "packages", monkeypatch)
    with allowing([], sqlite_url, tmp_path, bert_tiny) as (_, client):
        answers = [
            client.post("/v1/recipes/validate", json={"recipe": RECIPE}),
            client.post("/v1/jobs", json=JOB),
        ]
        listed = client.get("/v1/recipes/passes").json()["items"]
    for answer in answers:
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (422, "invalid_recipe")
        assert "the package nightpress-copy 1.0 has one and is installed, but it is not allowed" in problem["detail"]
        assert "NIGHTPRESS_PASSES='[\"nightpress-copy\"]'" in problem["hint"]
    assert {item["package"] for item in listed} == {None}
    assert [item["name"] for item in listed] == sorted(item["name"] for item in listed)
    assert {item["stage"] for item in listed} == {"source", "folder", "graph", "runtime", "measure"}


@pytest.mark.slow
def test_an_allowed_pass_is_listed_planned_and_submitted(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "packages", monkeypatch)
    with allowing(["nightpress-copy"], sqlite_url, tmp_path, bert_tiny) as (api, client):
        assert client.get("/v1/recipes/passes").json()["items"][-1] == {
            "name": "copy",
            "description": "Copy the model as it is.",
            "stage": "folder",
            "needs": "nothing",
            "exports": ["safetensors"],
            "package": "nightpress-copy",
            "version": "1.0",
            "problem": None,
        }
        assert '"copy"' in client.get("/v1/recipes/schema").text
        plan = client.post("/v1/recipes/validate", json={"recipe": RECIPE, "model": "tiny"}).json()["plan"]
        assert plan["steps"][0]["name"] == "copy"
        assert plan["estimate"]["seconds"] > 0
        assert client.post("/v1/jobs", json=JOB).status_code == 201
        catalog.allow(())  # as in a client's process, where the package is not installed
        with Client(api.url, api_key=api.key()) as ours:
            known = [options.package for options in ours.recipes.passes()]
        assert known == [None] * len(known)


@pytest.mark.slow
def test_a_broken_package_is_listed_with_its_problem_and_costs_nothing_else(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = OPTIONS.replace("from typing", "import nothing_of_the_kind\nfrom typing", 1)
    install(tmp_path / "packages", monkeypatch, modules={"options.py": broken})
    with allowing(["nightpress-copy"], sqlite_url, tmp_path, bert_tiny) as (_, client):
        *others, last = client.get("/v1/recipes/passes").json()["items"]
        assert last["name"] == "copy"
        assert "No module named 'nothing_of_the_kind'" in last["problem"]
        assert {other["problem"] for other in others} == {None}
        refused = client.post("/v1/jobs", json=JOB).json()
        assert (refused["code"], "No module named 'nothing_of_the_kind'" in refused["detail"]) == (
            "invalid_recipe",
            True,
        )
        assert client.post("/v1/jobs", json={**JOB, "recipe": "int8-encoder"}).status_code == 201


@pytest.mark.slow
def test_a_result_of_another_version_of_the_package_answers_no_job(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    install(packages, monkeypatch)
    with allowing(["copy"], sqlite_url, tmp_path, bert_tiny) as (api, client):
        first = client.post("/v1/jobs", json=JOB).json()["id"]
        claimed = api.claim()
        made_by = tuple(str(package) for package in catalog.packages_of(claimed.job.recipe))
        assert made_by == ("nightpress-copy 1.0",)
        shipped = api.ship(claimed, {"model.safetensors": b"0123456789"})
        assert api.services.resources.store.attempts.finish(claimed.lease, replace(shipped, packages=made_by))
        assert client.post("/v1/jobs", json=JOB).json()["reused_from"] == first
    shutil.rmtree(packages / "nightpress_copy-1.0.dist-info")
    install(packages, monkeypatch, version="1.1")
    with allowing(["copy"], sqlite_url, tmp_path, bert_tiny) as (api, client):
        job = client.post("/v1/jobs", json=JOB).json()
        assert (job["state"], job["reused_from"]) == ("queued", None)
        # A worker with an older version of the package made the result. The API compares it with its own version.
        claimed = api.claim()
        shipped = api.ship(claimed, {"model.safetensors": b"0123456789"})
        assert api.services.resources.store.attempts.finish(claimed.lease, replace(shipped, packages=made_by))
        assert client.post("/v1/jobs", json=JOB).json()["reused_from"] is None


def test_a_worker_without_the_package_leaves_the_job_to_another(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "packages", monkeypatch)
    with allowing(["copy"], sqlite_url, tmp_path, bert_tiny) as (api, client):
        client.post("/v1/jobs", json=JOB)
        job = api.claim().job
    catalog.allow(())
    with pytest.raises(MachineFaultError, match=r"nightpress-copy 1\.0 has one and is installed") as fault:
        read_recipe(job)
    assert fault.value.code is ErrorCode.INTERNAL
    assert fault.value.reason.startswith("the worker lacks a pass: ")
