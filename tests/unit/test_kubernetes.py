"""The Kubernetes manifests follow Kubernetes' schemas. Their modules, settings, ports, paths and metrics exist in the code."""

import copy
import importlib.util
import ipaddress
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from nightpress.api.app import create_app
from nightpress.core.outbound import is_public
from nightpress.core.service.webhooks.targets import PORTS
from nightpress.core.settings import Settings
from nightpress.worker import health
from tests.unit.test_monitoring import exported

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
#: The keys of the Secret, which isn't in the repository: the how-to creates it.
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
    return [document for name in files for document in yaml.safe_load_all((FOLDER / folder / name).read_text())]


BASE = documents("base")
SCALERS = documents("keda")
PODS = {
    document["metadata"]["name"]: document["spec"]["template"]
    for document in BASE
    if document["kind"] in {"Deployment", "Job"}
}


def container_of(name: str) -> dict[str, Any]:
    (container,) = PODS[name]["spec"]["containers"]
    return dict(container)


def environment_of(name: str) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container_of(name).get("env", [])}


@pytest.mark.parametrize("document", BASE, ids=lambda document: f"{document['kind']}-{document['metadata']['name']}")
def test_a_manifest_follows_its_schema(document: dict[str, Any]):
    kubernetes_validate.validate(document, "1.30", strict=True)


def test_a_misspelt_field_would_be_found():
    broken = next(document for document in BASE if document["kind"] == "Service") | {"spec": {"selectr": {"a": "b"}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.30", strict=True)


def built(folder: Path) -> list[dict[str, Any]]:
    beside = Path(sys.prefix) / "bin" / "kubectl"  # where `make test` puts it
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("folder", ["base", "keda"])
def test_kustomize_builds_it(folder: str):
    kinds = [document["kind"] for document in built(FOLDER / folder)]
    assert kinds.count("Deployment") == 4
    assert kinds.count("ScaledObject") == (2 if folder == "keda" else 0)


def with_models() -> list[dict[str, Any]]:
    """The base with the component's patches applied. All of them are additions."""
    documents = copy.deepcopy(BASE)
    for patch in yaml.safe_load((FOLDER / "models" / "kustomization.yaml").read_text())["patches"]:
        target = patch["target"]
        for document in documents:
            if document["kind"] != target["kind"] or document["metadata"]["name"] != target.get(
                "name", document["metadata"]["name"]
            ):
                continue
            for step in yaml.safe_load(patch["patch"]):
                assert step["op"] == "add"
                *way, last = step["path"].removeprefix("/").split("/")
                place = document
                for part in way:
                    place = place[int(part) if isinstance(place, list) else part]
                place.append(step["value"]) if isinstance(place, list) else place.update({last: step["value"]})
    return documents


def test_whoever_reads_a_model_in_place_has_its_volume_and_may_not_write_it():
    claim = yaml.safe_load((FOLDER / "models" / "claim.yaml").read_text())
    kubernetes_validate.validate(claim, "1.30", strict=True)
    documents = with_models()
    config = next(document["data"] for document in documents if document["kind"] == "ConfigMap")
    (root,) = Settings(_env_file=None, model_roots=json.loads(config["NIGHTPRESS_MODEL_ROOTS"])).model_roots
    deployments = [document for document in documents if document["kind"] == "Deployment"]
    assert {deployment["metadata"]["name"] for deployment in deployments} == PODS.keys() - {"migrate"}
    for deployment in deployments:
        kubernetes_validate.validate(deployment, "1.30", strict=True)
        pod = deployment["spec"]["template"]["spec"]
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "models"]
        assert (mount["mountPath"], mount["readOnly"]) == (str(root), True)
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "models"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_kustomize_builds_it_with_models(tmp_path: Path):
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    (tmp_path / "kubernetes" / "mine").mkdir()
    mine = {"resources": ["../keda"], "components": ["../models"]}
    (tmp_path / "kubernetes" / "mine" / "kustomization.yaml").write_text(yaml.safe_dump(mine))
    made = built(tmp_path / "kubernetes" / "mine")
    mounted = [item for item in made if item["kind"] == "Deployment" and "/srv/models" in json.dumps(item)]
    assert len(mounted) == 4
    assert [item["metadata"]["namespace"] for item in made if item["kind"] == "PersistentVolumeClaim"] == ["nightpress"]


def test_the_way_out_leads_to_public_addresses_alone():
    (policy,) = [
        document
        for document in BASE
        if document["kind"] == "NetworkPolicy" and document["metadata"]["name"] == "outside"
    ]
    assert policy["spec"]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "control"}}
    (rule,) = policy["spec"]["egress"]
    assert {port["port"] for port in rule["ports"]} == PORTS

    def leads_to(address: str) -> bool:
        parsed = ipaddress.ip_address(address)
        blocks = [(ipaddress.ip_network(to["ipBlock"]["cidr"]), to["ipBlock"].get("except", [])) for to in rule["to"]]
        return any(
            parsed in network and not any(parsed in ipaddress.ip_network(hole) for hole in holes)
            for network, holes in blocks
        )

    inside = ["10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.31.0.1", "192.168.1.1", "224.0.0.1"]
    inside += ["::1", "::ffff:10.0.0.1", "fd00::1", "fe80::1", "64:ff9b::a00:1", "2002:a00:1::"]
    for address in [*inside, "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]:
        assert leads_to(address) == is_public(ipaddress.ip_address(address)), address


def test_every_file_is_used():
    for folder in ("base", "keda", "models"):
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
    (image,) = [image for image in images if image["name"] == container["image"]]
    assert f"-t nightpress:{image['newTag']} " in "".join(
        (ROOT / "deploy" / file).read_text() for file in ("Dockerfile", "Dockerfile.cuda")
    )


def test_every_variable_is_a_setting():
    config = next(document for document in BASE if document["kind"] == "ConfigMap")["data"]
    named = set(config) | SECRET | {variable for name in PODS for variable in environment_of(name)}
    assert named <= {f"NIGHTPRESS_{name.upper()}" for name in Settings.model_fields}
    for name in PODS:
        Settings(_env_file=None, **{k.removeprefix("NIGHTPRESS_").lower(): v for k, v in environment_of(name).items()})
        assert container_of(name)["envFrom"] == [
            {"configMapRef": {"name": "nightpress"}},
            {"secretRef": {"name": "nightpress"}},
        ]


def test_no_secret_stands_in_the_manifests_and_the_guide_makes_all_of_them():
    assert not any(document["kind"] == "Secret" for document in BASE)
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


@pytest.mark.slow
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
    volume = next(volume for volume in spec["volumes"] if volume["name"] == "data")["emptyDir"]["sizeLimit"]
    assert int(environment["NIGHTPRESS_CACHE_BYTES"]) <= int(volume.removesuffix("Gi")) * 1024**3 / 2


def test_every_selector_finds_pods():
    labels = [pod["metadata"]["labels"] | {"app.kubernetes.io/part-of": "nightpress"} for pod in PODS.values()]

    def finds(selector: dict[str, Any]) -> bool:
        wanted = selector.get("matchLabels", {})
        return any(wanted.items() <= label.items() for label in labels) and all(
            {label.get(rule["key"]) for label in labels} >= set(rule["values"])
            for rule in selector.get("matchExpressions", [])
        )

    for document in BASE:
        if document["kind"] == "NetworkPolicy":
            assert finds(document["spec"]["podSelector"]), document["metadata"]["name"]
        elif document["kind"] in {"Deployment", "PodDisruptionBudget"}:
            assert finds(document["spec"]["selector"]), document["metadata"]["name"]
        elif document["kind"] == "Service":
            assert finds({"matchLabels": document["spec"]["selector"]})


def test_a_scaler_watches_a_queue_that_is_counted():
    there = exported()
    for scaler in SCALERS:
        name = scaler["spec"]["scaleTargetRef"]["name"]
        assert name in PODS
        (trigger,) = scaler["spec"]["triggers"]
        query = trigger["metadata"]["query"]
        (metric,) = re.findall(r"nightpress_\w+", query)
        if name == "worker-gpu":
            assert query == "sum(max by (state) (nightpress_gpus))", "what is queued and what runs, counted in GPUs"
            assert there[metric] == {"state"}
            continue
        assert there[metric] >= {"queue", "state"}
        assert f'queue="{name.removeprefix("worker-")}"' in query
        assert "running" in query, "fewer workers than running jobs would stop one of them"
