"""One thing of each kind, for tests that compare what its tenant and others see of it."""

from pathlib import Path
from typing import NamedTuple

import httpx
from sqlalchemy import update

from nightpress.core.database import transaction
from nightpress.core.service.access.keys import create_key
from nightpress.core.service.access.oidc.people import PeopleBook
from nightpress.core.service.access.oidc.sessions import Confirmed
from nightpress.core.service.tables.studies import studies
from tests.api import RunningApi

S3_KEY = {"access_key_id": "key-secret", "secret_access_key": "very-secret"}


class Owned(NamedTuple):
    """The identifier of one thing of each kind that the first tenant has."""

    jobs: str
    models: str
    datasets: str
    schedules: str
    studies: str
    keys: str
    webhooks: str
    deliveries: str
    credentials: str
    sessions: str


def give(api: RunningApi, owner: httpx.Client, bert_tiny: Path) -> Owned:
    """Make one thing of each kind for the tenant of `owner`."""
    model = owner.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)}).json()["id"]
    data_file = api.services.resources.settings.data_dir.parent / "data.txt"
    data = owner.post("/v1/datasets", json={"name": "prose", "path": str(data_file)}).json()["id"]
    job = owner.post("/v1/jobs", json={"model": "tiny", "recipe": "int8-encoder"}).json()["id"]
    claimed = api.claim()
    assert api.services.resources.store.attempts.finish(
        claimed.lease, api.ship(claimed, {"model.onnx": b"secret weights"})
    )
    key = create_key(api.services.resources.engine, tenant_id="first", name="k", scopes=["jobs:read"])[0].id
    hook = owner.post("/v1/webhooks", json={"url": "http://127.0.0.1:1/", "events": ["job.failed"]}).json()["webhook"][
        "id"
    ]
    resources = api.services.resources
    person, _, _ = PeopleBook(resources.engine).know({"iss": "https://login", "sub": "a"})
    resources.sessions.begin(Confirmed(person, [], None), "first", state="s", replaces=None)
    session = owner.get("/v1/sessions").json()["items"][0]["id"]
    nightly = {"name": "nightly", "cron": "0 2 * * *", "job": {"model": "tiny", "recipe": "int8-encoder"}}
    schedule = owner.post("/v1/schedules", json=nightly).json()["id"]
    study = owner.post("/v1/studies", json={"model": "tiny", "gates": {"cosine": ">= 0.9"}}).json()["id"]
    told = {"winner": None, "chosen_again": False, "front": [], "runner_up": None, "sensitivity": [], "counts": {}}
    told |= {"reasons": {}, "cpu_seconds": 1.0, "gpu_seconds": 0.0, "seconds": 2.0, "split": "secret words"}
    with transaction(api.services.resources.engine) as connection:
        connection.execute(update(studies).where(studies.c.id == study).values(report=told))
    sealed = owner.post("/v1/credentials", json={"prefix": "s3://models", "secrets": S3_KEY}).json()["id"]
    sent = owner.post("/v1/deliveries", json={"job_id": job, "destinations": ["s3://models/x"]}).json()["items"][0][
        "id"
    ]
    return Owned(
        credentials=sealed,
        deliveries=sent,
        studies=study,
        jobs=job,
        models=model,
        datasets=data,
        schedules=schedule,
        keys=key,
        webhooks=hook,
        sessions=session,
    )
