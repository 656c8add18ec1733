"""Deliveries to a real OCI registry: pulled with ORAS' library and verified, resumed, replaced and refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nightpress.core.errors import NightpressError
from nightpress.core.handoff.attestation import read_public_keys
from nightpress.core.handoff.manifest import ATTESTATION_FILE
from nightpress.core.handoff.verification import verify_folder
from nightpress.core.service.claims import Claim
from nightpress.core.service.deliveries.exchange import sent_whole
from nightpress.core.service.deliveries.package import Item
from nightpress.core.service.deliveries.registry import RegistrySender
from tests.databases import migrated_sqlite
from tests.deliveries import FILES, TENANT, World, large_files
from tests.oci import PASSWORD, USER, Registry, needs_registry, serve_tokens
from tests.service import eventually

pytestmark = needs_registry
MIB = 1024**2
DELIVERED = FILES.keys() | {"README.md", "report.html", "report.json", ATTESTATION_FILE}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, registry: Registry) -> Iterator[World]:
    world = World(tmp_path, migrated_sqlite(tmp_path / "nightpress.db"), destinations=[f"oci://{registry.host}/team"])
    world.credentials(f"oci://{registry.host}", username=USER, password=PASSWORD)
    yield world
    world.close()


def manifest_of(registry: Registry, name: str, tag: str) -> tuple[dict, str]:
    kind = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    url = f"http://{registry.host}/v2/{name}/manifests/{tag}"
    answer = httpx.get(url, headers=kind, auth=(USER, PASSWORD), trust_env=False).raise_for_status()
    return answer.json(), answer.headers["docker-content-digest"]


@pytest.mark.slow
def test_a_model_that_oras_pulls_and_that_verifies(world: World, registry: Registry, tmp_path: Path) -> None:
    from oras.client import OrasClient

    job_id = world.accept(destinations=[f"oci://{registry.host}/team/{{model}}:{{job}}"])
    done = world.run()
    assert (done.state, done.error) == ("delivered", None)
    manifest, digest = manifest_of(registry, "team/tiny", job_id)
    assert done.result == {
        "url": f"{registry.host}/team/tiny:{job_id}",
        "digest": digest,
        "files": len(DELIVERED),
        "bytes": done.total_bytes,
    }
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    kinds = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]}
    assert kinds.keys() == DELIVERED
    assert kinds["model.onnx"] == "application/vnd.cncf.model.weight.v1.raw"
    assert kinds["config.json"] == "application/vnd.cncf.model.weight.config.v1.raw"
    assert kinds["README.md"] == "application/vnd.cncf.model.doc.v1.raw"
    client = OrasClient(hostname=registry.host, insecure=True, auth_backend="basic")
    client.auth.set_basic_auth(USER, PASSWORD)
    client.pull(target=f"{registry.host}/team/tiny:{job_id}", outdir=str(tmp_path / "pulled"))
    pem = world.resources.signing.public_keys()[0].public_key.encode()
    [verified] = verify_folder(tmp_path / "pulled", read_public_keys(pem))
    assert verified.faults == ()
    assert verified.signed.claims["job"] == job_id


@pytest.mark.slow
def test_a_repeated_delivery_sends_nothing_and_gives_the_same_digest(world: World, registry: Registry) -> None:
    url = f"oci://{registry.host}/team/same:latest"
    job_id = world.accept(destinations=[url])
    first = world.run()
    world.store.add(TENANT, job_id, [url])
    again = world.run()
    assert again.id != first.id
    assert (again.state, again.result) == ("delivered", first.result)
    assert again.log[-1].sent_bytes == 0


@pytest.mark.slow
def test_what_arrived_before_a_kill_is_not_sent_again(
    world: World, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is sent in pieces. The process ends after the third of five, and another goes on with the fourth."""
    monkeypatch.setattr("nightpress.core.service.deliveries.registry._PIECE", 4 * MIB)
    files = large_files(20 * MIB)
    world.accept({"onnx": files}, destinations=[f"oci://{registry.host}/team/large:latest"])
    killed, sent = world.new_courier(ttl_s=0.0), []
    ask = RegistrySender._ask

    def die_at_the_fourth(self: RegistrySender, method: str, url: str, **request: object) -> httpx.Response:
        sent.append(method)
        if sent.count("PATCH") > 4:  # the first is that of the small file
            raise KeyboardInterrupt
        return ask(self, method, url, **request)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RegistrySender, "_ask", die_at_the_fourth)
        killed.advance()
        eventually(lambda: not killed.running)
    killed.close()
    done = world.run()
    assert done.state == "delivered"
    assert done.log[-1].sent_bytes == done.total_bytes - 12 * MIB - len(files["config.json"])
    manifest, _ = manifest_of(registry, "team/large", "latest")
    assert max(layer["size"] for layer in manifest["layers"]) == 20 * MIB


@pytest.mark.slow
def test_a_control_process_that_stops_ends_its_request_and_the_next_goes_on(
    world: World, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightpress.core.service.deliveries.registry._PIECE", 4 * MIB)
    files = large_files(12 * MIB)
    world.accept({"onnx": files}, destinations=[f"oci://{registry.host}/team/stopped:latest"])
    stopping = world.new_courier()

    def stop_within_the_second(item: Item, start: int, end: int, claim: Claim) -> Iterator[bytes]:
        for piece in sent_whole(item, start, end, claim):
            yield piece
            if start == 4 * MIB:
                claim.lost.set()

    with monkeypatch.context() as patch:
        patch.setattr("nightpress.core.service.deliveries.registry.sent_whole", stop_within_the_second)
        patch.setattr(stopping, "_closing", True)
        stopping.advance()
        eventually(lambda: not stopping.running)
    stopping.close()
    [waiting] = world.deliveries()
    assert (waiting.state, waiting.running, waiting.attempts) == ("pending", False, 0)
    done = world.run()
    assert (done.state, done.attempts) == ("delivered", 1)
    assert done.log[-1].sent_bytes == done.total_bytes - 8 * MIB - len(files["config.json"])


@pytest.mark.slow
def test_a_blob_that_the_registry_forgot_is_sent_again(
    world: World, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightpress.core.service.deliveries.registry._PIECE", 4 * MIB)
    world.accept({"onnx": large_files(12 * MIB)}, destinations=[f"oci://{registry.host}/team/broken:latest"])
    killed = world.new_courier(ttl_s=0.0)

    def break_off(item: Item, start: int, end: int, claim: Claim) -> Iterator[bytes]:
        for piece in sent_whole(item, start, end, claim):
            yield piece
            if start == 4 * MIB:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nightpress.core.service.deliveries.registry.sent_whole", break_off)
        killed.advance()
        eventually(lambda: not killed.running)
    killed.close()
    assert world.run().state == "delivered"


@pytest.mark.slow
def test_a_wrong_password_fails_at_once(world: World, registry: Registry) -> None:
    credentials = world.resources.credentials
    credentials.delete(TENANT, credentials.page(TENANT, cursor=None, limit=1)[0][0].id)
    world.credentials(f"oci://{registry.host}/team", username=USER, password="wrong")
    world.accept(destinations=[f"oci://{registry.host}/team/x"])
    failed = world.run()
    assert (failed.state, failed.error and failed.error["code"]) == ("failed", "destination_refused")


@pytest.mark.slow
def test_a_registry_with_a_token_service(tmp_path: Path) -> None:
    with serve_tokens() as tokens, Registry(tmp_path / "registry", tokens) as registry:
        prefix = f"oci://{registry.host}"
        world = World(tmp_path, migrated_sqlite(tmp_path / "nightpress.db"), destinations=[prefix])
        world.credentials(prefix, username=USER, password=PASSWORD)
        world.accept(destinations=[f"{prefix}/Team/tiny:v1"])
        done = world.run()
        world.close()
    assert (done.state, done.error) == ("delivered", None)
    assert len(tokens.asked) > len(DELIVERED), "a token that is over was used again"
    assert set(tokens.asked) == {"repository:team/tiny:pull,push"}
    assert json.dumps(done.result).count(registry.host) == 1


@pytest.mark.slow
def test_names_of_registries_are_in_lower_case_and_whole(world: World, registry: Registry) -> None:
    job_id = world.accept()
    for url in ("oci://Registry.example.com/x", f"oci://{registry.host}/teams/x", f"oci://{registry.host}/team/../x"):
        with pytest.raises(NightpressError):
            world.store.add(TENANT, job_id, [url])
