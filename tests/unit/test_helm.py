"""The Helm chart makes what the plain manifests have, follows Kubernetes' schemas, and refuses values that mean nothing.

The manifests in deploy/kubernetes are the source: tests/unit/test_kubernetes.py holds them to the code. Here `helm template` is compared
with `kubectl kustomize`, document by document.
"""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from nightpress.core.settings import Settings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "nightpress"
MANIFESTS = ROOT / "deploy" / "kubernetes"
#: What the chart has on top, and why the plain manifests don't.
_HELMS_OWN_LABELS = {"helm.sh/chart", "app.kubernetes.io/managed-by"}
_HELMS_OWN_ANNOTATIONS = {"checksum/config"}  # new pods for new settings: `kubectl apply` can't do that


def program(name: str) -> str:
    """The program beside this Python, where `make test` puts it, or on the path."""
    beside = Path(sys.prefix) / "bin" / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: `make test` installs it")
    return found


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("helm"), *arguments], capture_output=True, text=True, timeout=60)


@cache
def _rendered(*values: str) -> str:
    sets = [part for value in values for part in ("--set-json", value)]
    done = helm("template", "nightpress", str(CHART), "--namespace", "nightpress", *sets)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(*values: str) -> list[dict[str, Any]]:
    """The documents that the chart makes. `values`: assignments, e.g. `keda.enabled=true`."""
    return [document for document in yaml.safe_load_all(_rendered(*values)) if document]


def named(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [item for item in documents if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


@cache
def _kustomized(folder: Path) -> str:
    done = subprocess.run([program("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain(document: dict[str, Any]) -> dict[str, Any]:
    """A document without what only one of the two forms has."""
    bare = copy.deepcopy(document)
    for metadata in _metadata_of(bare):
        for name in _HELMS_OWN_LABELS:
            metadata.get("labels", {}).pop(name, None)
        for name in _HELMS_OWN_ANNOTATIONS:
            metadata.get("annotations", {}).pop(name, None)
    bare["metadata"].pop("namespace", None)  # Helm says it when it installs
    if (
        bare["kind"] == "Job"
    ):  # a Job can't be changed: the chart names it after the revision, and removes it after a day
        bare["metadata"]["name"] = "migrate"
        bare["spec"].pop("ttlSecondsAfterFinished", None)
    return bare


def _metadata_of(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if isinstance(value.get("metadata"), dict):
            yield value["metadata"]
        for inner in value.values():
            yield from _metadata_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _metadata_of(inner)


def by_name(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    bare = [plain(document) for document in documents]
    found = {f"{document['kind']} {document['metadata']['name']}": document for document in bare}
    assert len(found) == len(bare)
    return found


@pytest.mark.parametrize(
    ("folder", "values"),
    [("base", ()), ("keda", ("keda.enabled=true",)), ("models", ("models.enabled=true", "keda.enabled=true"))],
)
@pytest.mark.slow
def test_the_chart_makes_what_the_plain_manifests_have(folder: str, values: tuple[str, ...], tmp_path: Path):
    place = MANIFESTS / folder
    if folder == "models":
        shutil.copytree(MANIFESTS, tmp_path / "kubernetes")
        place = tmp_path / "kubernetes" / "mine"
        place.mkdir()
        mine = {"resources": ["../keda"], "components": ["../models"]}
        (place / "kustomization.yaml").write_text(yaml.safe_dump(mine))
    theirs = by_name(list(yaml.safe_load_all(_kustomized(place))))
    ours = by_name(rendered(*values))
    del theirs["Namespace nightpress"]  # `helm install --create-namespace` makes it
    for kind in ("ScaledObject", "PersistentVolumeClaim"):  # kustomize's label is for the base alone
        for name, document in ours.items():
            if name.startswith(kind):
                document["metadata"].pop("labels", None)
        for name, document in theirs.items():
            if name.startswith(kind):
                document["metadata"].pop("labels", None)
    assert ours.keys() == theirs.keys()
    for name, document in ours.items():
        assert document == theirs[name], name


POOLS = json.dumps(
    {
        "queue": "gpu",
        "gpus": 4,
        "workersPerPod": 2,
        "drainSeconds": 15,
        "nodeSelector": {"cloud.google.com/gke-spot": "true"},
        "tolerations": [{"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}],
        "env": {"NIGHTPRESS_CHECKPOINT_AFTER_S": 10},
    }
)
EVERYTHING = (
    "keda.enabled=true",
    "models.enabled=true",
    "ingress.enabled=true",
    'ingress.className="nginx"',
    'network.provider=["203.0.113.0/24"]',
    'image.pullSecrets=["registry"]',
    'image.pullPolicy="Always"',
    'workers.cpu.affinity={"nodeAffinity": {}}',
    'workers.cpu.priorityClassName="night"',
    f"workers.gpu-spot={POOLS}",
)


@pytest.mark.parametrize("values", [(), EVERYTHING], ids=["defaults", "everything"])
@pytest.mark.slow
def test_what_the_chart_makes_follows_kubernetes_schemas(values: tuple[str, ...]):
    kinds = []
    for document in rendered(*values):
        kinds.append(document["kind"])
        if document["kind"] != "ScaledObject":  # KEDA's own; compared with the plain manifests above
            kubernetes_validate.validate(document, "1.30", strict=True)
    assert kinds.count("Deployment") == (5 if values else 4)
    assert kinds.count("Ingress") == kinds.count("PersistentVolumeClaim") == bool(values)


@pytest.mark.slow
def test_helm_finds_nothing_to_complain_about():
    for values in ((), EVERYTHING):
        done = helm("lint", str(CHART), "--strict", *(part for value in values for part in ("--set-json", value)))
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_pool_of_spot_nodes_fills_its_machines_and_drains_in_time():
    documents = rendered(*EVERYTHING)
    pod = named(documents, "Deployment", "worker-gpu-spot")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 75
    assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert [entry["key"] for entry in pod["tolerations"]] == ["cloud.google.com/gke-spot"]
    assert len(pod["containers"]) == 2
    ports, mounts = set(), []
    for container in pod["containers"]:
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert (environment["NIGHTPRESS_WORKER_QUEUE"], environment["NIGHTPRESS_DRAIN_S"]) == ("gpu", "15")
        assert environment["NIGHTPRESS_CHECKPOINT_AFTER_S"] == "10"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
        assert container["resources"]["limits"]["memory"] == "64Gi", "taken from the pool `gpu`"
        (port,) = container["ports"]
        assert str(port["containerPort"]) == environment["NIGHTPRESS_METRICS_PORT"]
        ports.add(port["containerPort"])
        mounts += [mount["name"] for mount in container["volumeMounts"] if mount["name"] != "models"]
        Settings(
            _env_file=None, **{name.removeprefix("NIGHTPRESS_").lower(): value for name, value in environment.items()}
        )
    assert ports == set(range(9100, 9102))
    assert len(set(mounts)) == len(mounts) == 4, "no two workers share a disk"
    assert {volume["name"] for volume in pod["volumes"]} == {*mounts, "models"}
    scaler = named(documents, "ScaledObject", "worker-gpu-spot")["spec"]
    assert scaler["triggers"][0]["metadata"]["threshold"] == "8", "a pod for eight GPUs"
    assert "nightpress_gpus" in scaler["triggers"][0]["metadata"]["query"]
    metrics = named(documents, "NetworkPolicy", "metrics")["spec"]
    assert "worker-gpu-spot" in metrics["podSelector"]["matchExpressions"][0]["values"]
    assert {port["port"] for port in metrics["ingress"][0]["ports"]} == ports


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("api.replica=2", "additional properties 'replica' not allowed"),
        ("workers.gpu.gpus=-1", "workers/gpu"),
        ('workers.other={"replicas": 1}', "give its queue"),
        ('workers={"gpu": null, "gpu-spot": {"queue": "gpu"}}', "workers.gpu"),
        ('config.NIGHTPRESS_SECRET_KEY="x"', "NIGHTPRESS_SECRET_KEY"),
        ('config.NIGHTPRESS_DATABASE_URL="x"', "NIGHTPRESS_DATABASE_URL"),
        ("network.servers=[]", "network/servers"),
    ],
)
def test_values_that_mean_nothing_or_are_secret_are_refused(value: str, says: str):
    done = helm("template", "x", str(CHART), "--set-json", value)
    assert done.returncode != 0
    assert says in done.stderr


def test_every_value_is_in_the_schema_and_the_readme_and_every_setting_exists():
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    readme = (CHART / "README.md").read_text()
    assert values.keys() == schema.keys() - {"global"}
    for name, value in values.items():
        inner = schema[name].get("properties")
        if inner is None:
            assert schema[name]["description"] in readme
            continue
        assert value.keys() == inner.keys(), name
        for key, entry in inner.items():
            assert f"`{name}.{key}`" in readme
            assert entry["description"] in readme
    pool = schema["workers"]["additionalProperties"]["oneOf"][1]["properties"]
    for queue in ("cpu", "gpu"):
        assert values["workers"][queue].keys() == pool.keys()
    assert set(values["config"]) <= {f"NIGHTPRESS_{name.upper()}" for name in Settings.model_fields}
