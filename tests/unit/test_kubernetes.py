"""The Kubernetes manifests follow Kubernetes' schemas, and name only what the code has: modules, settings, ports, paths, metrics."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from api.app import create_app
from core.settings import Settings
from tests.unit.test_monitoring import exported
from worker import health

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
#: The Secret isn't in the repository; the how-to makes it.
SECRET = {
    "NIGHTPRESS_DATABASE_URL",
    "NIGHTPRESS_BROKER_URL",
    "NIGHTPRESS_SECRET_KEY",
    "NIGHTPRESS_S3_ACCESS_KEY_ID",
    "NIGHTPRESS_S3_SECRET_ACCESS_KEY",
}


def documents(folder: str) -> list[dict[str, Any]]:
    kustomization = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
    files = [name for name in kustomization["resources"] if name.endswith(".yaml")]
    return [one for name in files for one in yaml.safe_load_all((FOLDER / folder / name).read_text())]


BASE = documents("base")
SCALERS = documents("keda")
PODS = {one["metadata"]["name"]: one["spec"]["template"] for one in BASE if one["kind"] in {"Deployment", "Job"}}


def container_of(name: str) -> dict[str, Any]:
    (container,) = PODS[name]["spec"]["containers"]
    return dict(container)


def environment_of(name: str) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container_of(name).get("env", [])}


@pytest.mark.parametrize("document", BASE, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_a_manifest_follows_its_schema(document: dict[str, Any]):
    kubernetes_validate.validate(document, "1.30", strict=True)


def test_a_misspelt_field_would_be_found():
    broken = next(one for one in BASE if one["kind"] == "Service") | {"spec": {"selectr": {"a": "b"}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.30", strict=True)


@pytest.mark.parametrize("folder", ["base", "keda"])
def test_kustomize_builds_it(folder: str):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    built = subprocess.run(["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    kinds = [one["kind"] for one in yaml.safe_load_all(built.stdout)]
    assert kinds.count("Deployment") == 4
    assert kinds.count("ScaledObject") == (2 if folder == "keda" else 0)


def test_every_file_is_used():
    for folder in ("base", "keda"):
        listed = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())["resources"]
        assert {path.name for path in (FOLDER / folder).glob("*.yaml")} - {"kustomization.yaml"} <= set(listed)


def test_every_part_of_the_service_is_there():
    assert set(PODS) == {"migrate", "api", "control", "worker-cpu", "worker-gpu"}


@pytest.mark.parametrize("name", PODS)
def test_a_container_runs_a_module_that_exists_from_an_image_that_we_build(name: str):
    container = container_of(name)
    program, flag, module = container["args"][:3]
    assert (program, flag) == ("python", "-m")
    assert importlib.util.find_spec(module)
    images = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text())["images"]
    (image,) = [one for one in images if one["name"] == container["image"]]
    assert f"-t nightpress:{image['newTag']} " in "".join(
        (ROOT / "deploy" / file).read_text() for file in ("Dockerfile", "Dockerfile.cuda")
    )


def test_every_variable_is_a_setting():
    config = next(one for one in BASE if one["kind"] == "ConfigMap")["data"]
    named = set(config) | SECRET | {variable for name in PODS for variable in environment_of(name)}
    assert named <= {f"NIGHTPRESS_{name.upper()}" for name in Settings.model_fields}
    for name in PODS:
        Settings(_env_file=None, **{k.removeprefix("NIGHTPRESS_").lower(): v for k, v in environment_of(name).items()})
        assert container_of(name)["envFrom"] == [
            {"configMapRef": {"name": "nightpress"}},
            {"secretRef": {"name": "nightpress"}},
        ]


def test_no_secret_stands_in_the_manifests_and_the_guide_makes_all_of_them():
    assert not any(one["kind"] == "Secret" for one in BASE)
    guide = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()
    made = guide[guide.index("create secret generic nightpress") :].split("```")[0]
    assert set(re.findall(r"--from-literal=(\w+)=", made)) == SECRET


@pytest.mark.parametrize("name", PODS)
def test_a_pod_may_do_nothing_that_it_needn_t(name: str):
    spec, container = PODS[name]["spec"], container_of(name)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001, "the images' user"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]


def test_the_api_is_probed_where_it_answers(tmp_path: Path):
    container = container_of("api")
    routes = set(create_app(Settings(_env_file=None, data_dir=tmp_path)).openapi()["paths"])
    (port,) = container["ports"]
    assert str(port["containerPort"]) == environment_of("api")["NIGHTPRESS_API_PORT"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in routes
        assert container[probe]["httpGet"]["port"] == port["name"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz", (
        "a database that is away is no reason to restart"
    )


@pytest.mark.parametrize("name", ["control", "worker-cpu", "worker-gpu"])
def test_the_others_are_probed_by_their_mark(name: str):
    container = container_of(name)
    command = container["livenessProbe"]["exec"]["command"]
    assert command == ["python", "-m", health.__name__, *(["--control"] if name == "control" else [])]
    assert {"name": "data", "mountPath": "/var/lib/nightpress"} in container["volumeMounts"], "it leaves its mark there"
    assert str(container["ports"][0]["containerPort"]) == environment_of(name)["NIGHTPRESS_METRICS_PORT"]


@pytest.mark.parametrize("name", ["worker-cpu", "worker-gpu"])
def test_a_worker_is_given_the_time_to_drain_and_the_room_for_its_cache(name: str):
    spec, environment = PODS[name]["spec"], environment_of(name)
    assert spec["terminationGracePeriodSeconds"] > float(environment["NIGHTPRESS_DRAIN_S"])
    assert environment["NIGHTPRESS_WORKER_QUEUE"] == name.removeprefix("worker-")
    volume = next(one for one in spec["volumes"] if one["name"] == "data")["emptyDir"]["sizeLimit"]
    assert int(environment["NIGHTPRESS_CACHE_BYTES"]) <= int(volume.removesuffix("Gi")) * 1024**3 / 2


def test_every_selector_finds_pods():
    labels = [pod["metadata"]["labels"] | {"app.kubernetes.io/part-of": "nightpress"} for pod in PODS.values()]

    def finds(selector: dict[str, Any]) -> bool:
        wanted = selector.get("matchLabels", {})
        return any(wanted.items() <= one.items() for one in labels) and all(
            {one.get(rule["key"]) for one in labels} >= set(rule["values"])
            for rule in selector.get("matchExpressions", [])
        )

    for one in BASE:
        if one["kind"] == "NetworkPolicy":
            assert finds(one["spec"]["podSelector"]), one["metadata"]["name"]
        elif one["kind"] in {"Deployment", "PodDisruptionBudget"}:
            assert finds(one["spec"]["selector"]), one["metadata"]["name"]
        elif one["kind"] == "Service":
            assert finds({"matchLabels": one["spec"]["selector"]})


def test_a_scaler_watches_a_queue_that_is_counted():
    there = exported()
    for scaler in SCALERS:
        name = scaler["spec"]["scaleTargetRef"]["name"]
        assert name in PODS
        (trigger,) = scaler["spec"]["triggers"]
        query = trigger["metadata"]["query"]
        (metric,) = re.findall(r"nightpress_\w+", query)
        assert there[metric] >= {"queue", "state"}
        assert f'queue="{name.removeprefix("worker-")}"' in query
        assert "running" in query, "fewer workers than running jobs would stop one of them"
