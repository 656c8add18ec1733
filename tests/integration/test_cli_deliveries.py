"""`nightpress credentials`, `deliveries`, `verify` and `signing-keys` against a real API and the courier of its control process."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress.core.service.compose import Resources
from nightpress.core.service.deliveries.courier import DeliveryCourier
from tests.command import run
from tests.face import RECIPE, Face
from tests.hub import Hub, serve_hub
from tests.service import eventually

HERE = "hf://acme/{model}-int8@main"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        hub.writes.tokens = {"hf_right"}
        yield hub


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory, hub: Hub, bert_tiny: Path) -> Iterator[Face]:
    allowed = {"destinations": ["hf://acme"], "hub_endpoint": hub.url, "destination_networks": ["127.0.0.0/8"]}
    face = Face(tmp_path_factory.mktemp("face"), **allowed)
    face.start()
    with face.client() as client:
        client.models.upload(bert_tiny, "mine")
    yield face
    face.close()


@pytest.fixture(scope="module")
def courier(face: Face) -> Iterator[DeliveryCourier]:
    found = Resources(face.settings, face.engine)
    courier = DeliveryCourier(
        found.deliveries, found.credentials, found.signing, face.engine, found.objects, face.settings
    )
    yield courier
    courier.close()


def said(face: Face, *arguments: str, stdin: str = "") -> str:
    done = run(face, *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_result_is_submitted_with_a_destination_delivered_pulled_and_verified(
    face: Face, hub: Hub, courier: DeliveryCourier, tmp_path: Path
) -> None:
    (tmp_path / "own.json").write_text(json.dumps(RECIPE))
    refused = run(face, "submit", "mine", "-r", str(tmp_path / "own.json"), "--to", "hf://other/x")
    assert (refused.returncode, "operator" in refused.stderr) == (4, True)
    job = said(face, "submit", "mine", "-r", str(tmp_path / "own.json"), "--to", HERE).strip()
    assert HERE in said(face, "inspect", job)
    made = face.succeed(face.claim())

    assert "No credentials" in deliver(face, courier, job)["error"]["message"]
    wrong = run(face, "credentials", "add", "hf://acme", "--from", "-", stdin="password=x\n")
    assert wrong.returncode == 6
    stored = json.loads(said(face, "credentials", "add", "hf://acme", "--from", "-", "--json", stdin="token=hf_old\n"))
    said(face, "credentials", "rotate", stored["id"], "--from", "-", stdin="token=hf_right\n")
    assert "hf_" not in said(face, "credentials", "--json")
    [failed] = json.loads(said(face, "deliveries", "--job", job, "--json"))
    said(face, "deliveries", "retry", failed["id"])
    done = deliver(face, courier, job)
    assert (done["state"], done["destination"]) == ("delivered", "hf://acme/mine-int8@main")
    assert hub.branches["models/acme/mine-int8", "main"] == done["result"]["commit"]
    assert done["result"]["commit"] in said(face, "deliveries", "show", done["id"])

    keys, pulled = tmp_path / "service.pem", tmp_path / "pulled"
    said(face, "signing-keys", "--out", str(keys))
    said(face, "pull", job, "--out", str(pulled))
    face.stop()  # no server is needed from here on
    try:
        [found] = json.loads(said(face, "verify", str(pulled), "--key", str(keys), "--json"))
        assert (found["authentic"], found["statement"]["job"], found["files"]) == (True, job, 2)
        assert found["statement"]["figures"][0]["low"] == 0.993
        weights = pulled / "compressed-tensors" / "sub dir" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        (pulled / "report.md").write_text((made / "report.md").read_text() + "better")
        changed = run(face, "verify", str(pulled), "--key", str(keys))
        assert changed.returncode == 9
        assert "sub dir/model.safetensors is changed" in changed.stdout
        assert "../report.md is changed" in changed.stdout
    finally:
        face.start()


@pytest.mark.slow
def test_schedules_and_models_have_destinations(face: Face, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(RECIPE))
    recipe = ["--model", "mine", "--recipe", str(tmp_path / "own.json")]
    said(face, "schedule", "add", "nightly", "--cron", "0 2 * * *", *recipe, "--to", HERE)
    assert json.loads(said(face, "schedule", "show", "nightly", "--json"))["schedule"]["job"]["destinations"] == [HERE]
    said(face, "schedule", "edit", "nightly", "--to", "hf://acme/other")
    assert "hf://acme/other" in said(face, "schedule", "show", "nightly")
    said(face, "schedule", "edit", "nightly", "--to", "")
    shown = json.loads(said(face, "schedule", "show", "nightly", "--json"))
    assert shown["schedule"]["job"].get("destinations", []) == []
    assert said(face, "deliveries", "of-model", "mine", "--to", HERE, "--to", "hf://acme/two").split() == [
        HERE,
        "hf://acme/two",
    ]
    assert json.loads(said(face, "deliveries", "of-model", "mine", "--none", "--json"))["destinations"] == []


def deliver(face: Face, courier: DeliveryCourier, job: str) -> dict:
    courier.advance()
    eventually(lambda: not courier.running)
    [found] = json.loads(said(face, "deliveries", "--job", job, "--json"))
    return json.loads(said(face, "deliveries", "show", found["id"], "--json"))
