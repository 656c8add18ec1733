"""The deployment files are valid: by their schemas, and by the names in them. No container engine is needed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.mark.slow
def test_the_compose_file_follows_the_compose_specification() -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        "docker-compose.yml",
    ]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_compose_file_has_every_part_and_a_health_check_for_each() -> None:
    services = COMPOSE["services"]
    assert {"postgres", "valkey", "storage", "migrate", "api", "control", "worker-cpu", "worker-gpu"} == set(services)
    assert all("healthcheck" in service for name, service in services.items() if name != "migrate")


def test_whoever_reads_a_model_in_place_has_its_folder_and_may_not_write_it() -> None:
    roots = json.loads(COMPOSE["x-nightpress"]["environment"]["NIGHTPRESS_MODEL_ROOTS"])
    for name in ("api", "control", "worker-cpu", "worker-gpu"):
        mounts = [volume for volume in COMPOSE["services"][name]["volumes"] if volume.startswith("${MODELS_DIR")]
        assert [f"{mount.rpartition('}:')[2]}" for mount in mounts] == [f"{root}:ro" for root in roots], name


def test_no_port_is_open_to_the_world() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_no_secret_stands_in_the_compose_file() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in ("POSTGRES_PASSWORD", "BROKER_PASSWORD", "S3_SECRET_KEY", "SECRET_KEY"):
        assert re.search(rf"\$\{{{name}:\?", text), f"{name} must be required, not defaulted"


def test_every_image_runs_as_nobody_in_particular() -> None:
    for file in ("Dockerfile", "Dockerfile.cuda"):
        stages = (ROOT / "deploy" / file).read_text().split("\nFROM ")
        final = [stage for stage in stages if "CMD [" in stage]
        assert final
        assert all("USER 10001:10001" in stage for stage in final), file


def test_every_built_image_copies_files_that_exist() -> None:
    for file in ("Dockerfile", "Dockerfile.cuda"):
        for line in re.findall(r"^COPY (.+) \S+$", (ROOT / "deploy" / file).read_text(), re.M):
            assert all((ROOT / name).exists() for name in line.split()), f"{file}: COPY {line}"
