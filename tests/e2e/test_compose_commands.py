"""Runs the commands of docker-compose.yml as processes, with PostgreSQL, a Valkey with a password, an S3 store, and a real model."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from nightpress.client import Client
from nightpress.client.folders import read_model_folder
from nightpress.core.handoff.manifest import digest_of
from tests.face import pulled_files
from tests.patience import slowness
from tests.servers import S3, Postgres, Valkey, free_port

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PASSWORD = "a-broker-password"


def environment_of(service: str, addresses: dict[str, str], secrets: dict[str, str], data_dir: Path) -> dict[str, str]:
    """The service's environment as compose makes it, but with the hosts and secrets of this test's servers."""
    environment = {}
    for name, value in SERVICES[service]["environment"].items():
        text = re.sub(r"\$\{(\w+)(?::[-?][^}]*)?\}", lambda match: secrets[match.group(1)], str(value))
        for inside, outside in addresses.items():
            text = text.replace(inside, outside)
        environment[name] = text
    return {
        **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
        **environment,
        "NIGHTPRESS_DATA_DIR": str(data_dir),
        "PYTHONPATH": str(ROOT),
    }


def command_of(service: str) -> list[str]:
    program, *arguments = SERVICES[service]["command"]
    assert program == "python"
    return [sys.executable, *arguments]


@contextmanager
def running(service: str, environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{service}.log").open("wb") as log:
        process = subprocess.Popen(command_of(service), env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20 * slowness())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def healthy(service: str, environment: dict[str, str]) -> bool:
    """Run the service's health check as compose does. Returns whether it passed."""
    test = SERVICES[service]["healthcheck"]["test"]
    assert test[:2] == ["CMD", "python"]
    arguments = [argument.replace("8790", environment["NIGHTPRESS_API_PORT"]) for argument in test[2:]]
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True).returncode == 0


def wait_until(seen: Any, seconds: float) -> None:
    began = time.monotonic()
    while not seen():
        assert time.monotonic() - began < seconds * slowness(), "it did not come to pass"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_model_goes_through_the_production_stack(
    tmp_path: Path, postgres_server: Postgres, s3_server: S3, bert_tiny: Path
) -> None:
    database = postgres_server.create_database()
    bucket = s3_server.create_bucket()
    api_port = str(free_port())
    with Valkey(tmp_path / "valkey", password=PASSWORD) as valkey:
        addresses = {
            "postgresql://nightpress:secret@postgres:5432/nightpress": database,
            "valkey:6379": f"127.0.0.1:{valkey.port}",
            "http://storage:8333": s3_server.endpoint,
            "s3://nightpress": f"s3://{bucket}",
        }
        secrets = {
            "POSTGRES_PASSWORD": "secret",
            "BROKER_PASSWORD": PASSWORD,
            "S3_SECRET_KEY": s3_server.secret_key,
            "SECRET_KEY": "what webhooks' secrets are derived from",
            "S3_PUBLIC_ENDPOINT_URL": s3_server.endpoint,
        }
        environments = {
            service: environment_of(service, addresses, secrets, tmp_path / service)
            | {
                "NIGHTPRESS_API_HOST": "127.0.0.1",
                "NIGHTPRESS_API_PORT": api_port,
                "NIGHTPRESS_S3_ACCESS_KEY_ID": s3_server.access_key,
                "NIGHTPRESS_WORKER_SPARE": "false",  # the last spare would import torch in vain
            }
            for service in ("migrate", "api", "control", "worker-cpu")
        }
        subprocess.run(command_of("migrate"), env=environments["migrate"], check=True, cwd=tmp_path, timeout=60)
        create_key = [sys.executable, "-m", "nightpress.core.service.access", "create-key", "--name", "first"]
        made = subprocess.run(
            create_key, env=environments["api"], check=True, cwd=tmp_path, capture_output=True, text=True
        )
        key = re.search(r"np_\S+", made.stdout)
        assert key, made.stdout

        with (
            running("api", environments["api"], tmp_path),
            running("control", environments["control"], tmp_path),
            running("worker-cpu", environments["worker-cpu"], tmp_path),
            Client(f"http://127.0.0.1:{api_port}", key.group(), timeout_s=10) as nightpress,
        ):
            for service in ("api", "control", "worker-cpu"):
                wait_until(lambda name=service: healthy(name, environments[name]), seconds=60)
            assert nightpress.ready().status == "ok"

            model = nightpress.models.upload(read_model_folder(bert_tiny, "bert-tiny"))
            assert model.state == "ready"
            job = nightpress.jobs.submit(model.id, "sparse-half", labels={"stack": "production"})
            job = nightpress.jobs.wait(job.id, timeout_s=240)
            assert job.state == "succeeded", job.error

            (artifact,) = nightpress.jobs.artifacts(job.id)
            answer = httpx.get(
                f"http://127.0.0.1:{api_port}{artifact.download_url}config.json",
                headers={"Authorization": f"Bearer {key.group()}"},
            )
            assert answer.status_code == 307, "an S3 store serves its files itself"
            assert answer.headers["location"].startswith(s3_server.endpoint)

            (folder,) = nightpress.jobs.download(job.id, tmp_path / "pulled")
            assert digest_of(pulled_files(folder)) == artifact.digest
            assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
            report = nightpress.jobs.report(job.id).report
            assert report["artifacts"][0]["verification"]["passed"] is True
