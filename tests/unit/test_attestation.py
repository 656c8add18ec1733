"""Signed statements: whatever is changed in an artifact's folder or in its statement is found."""

import base64
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.attestation import (
    make_statement,
    private_key_from,
    public_pem,
    read_bundle,
    read_public_keys,
    sign_statement,
)
from nightpress.core.handoff.manifest import ATTESTATION_FILE, ArtifactEntry, FileEntry, describe_bytes
from nightpress.core.handoff.verification import FileFault, verify_folder
from tests.deliveries import FILES, drawn, report_of

KEY = private_key_from(secrets.token_bytes(64))
Change = Callable[[Path], object]


def deliver(folder: Path, key: EllipticCurvePrivateKey = KEY) -> dict[str, Any]:
    """Fill a folder as a delivery does. Returns the statement."""
    files = tuple(describe_bytes(path, data) for path, data in FILES.items())
    report = report_of("job_1", [ArtifactEntry(format="onnx", path="onnx", files=files, consumer="x")])
    texts = drawn(report)
    for path, data in {**FILES, **texts}.items():
        target = folder / ("README.md" if path == "report.md" else path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    described: list[FileEntry] = [describe_bytes(name, text) for name, text in texts.items()]
    statement = make_statement(report, report.artifacts[0], files, described, engine="0.1.0")
    (folder / ATTESTATION_FILE).write_text(json.dumps(sign_statement(statement, key)))
    return statement


def test_the_statement_names_what_the_artifact_was_made_of_and_what_was_measured(tmp_path: Path) -> None:
    deliver(tmp_path)
    [found] = verify_folder(tmp_path, [KEY.public_key()])
    assert found.faults == ()
    claims = found.signed.claims
    report = json.loads((tmp_path / "report.json").read_text())
    assert claims["source"] == {"name": report["model"]["name"], "digest": report["model"]["digest"]}
    assert claims["recipe"] == report["recipe"]
    assert (claims["engine"], claims["verdict"]) == ("0.1.0", "accepted")
    assert claims["environment"]["versions"] == report["environment"]["versions"]
    assert claims["data"] == [{"ref": used["ref"], "sha256": used["sha256"]} for used in report["data"]]
    assert claims["figures"] == report["artifacts"][0]["measurements"]
    assert any(figure["low"] is not None and figure["high"] is not None for figure in claims["figures"])


def flip(path: str, at: int = -1) -> Change:
    def change(folder: Path) -> None:
        data = bytearray((folder / path).read_bytes())
        data[at] ^= 1
        (folder / path).write_bytes(bytes(data))

    return change


def nudge_a_figure(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["artifacts"][0]["measurements"][0]["value"] += 1e-9
    (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (flip("model.onnx"), FileFault("model.onnx", "changed")),
        (flip("model.onnx", 0), FileFault("model.onnx", "changed")),
        (flip("sub/vocab.txt"), FileFault("sub/vocab.txt", "changed")),
        (flip("README.md"), FileFault("README.md", "changed")),
        (flip("report.html"), FileFault("report.html", "changed")),
        (nudge_a_figure, FileFault("report.json", "changed")),
        (lambda folder: (folder / "config.json").unlink(), FileFault("config.json", "missing")),
        (lambda folder: (folder / "more.bin").write_bytes(b""), FileFault("more.bin", "not named")),
        (lambda folder: (folder / "sub" / "modeling.py").write_bytes(b""), FileFault("sub/modeling.py", "not named")),
    ],
)
def test_each_changed_file_is_named(tmp_path: Path, change: Change, fault: FileFault) -> None:
    deliver(tmp_path)
    change(tmp_path)
    [found] = verify_folder(tmp_path, [KEY.public_key()])
    assert found.faults == (fault,)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in a tree of JSON."""
    if isinstance(tree, dict):
        return [place for key, value in tree.items() for place in leaves(value, (*path, key))]
    if isinstance(tree, list):
        return [place for key, value in enumerate(tree) for place in leaves(value, (*path, key))]
    return [path]


@pytest.mark.slow
def test_every_value_of_the_statement_is_signed(tmp_path: Path) -> None:
    statement = deliver(tmp_path)
    bundle = json.loads((tmp_path / ATTESTATION_FILE).read_text())
    places = leaves(statement)
    assert len(places) > 100
    for place in places:
        changed = json.loads(json.dumps(statement))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = "other" if inner[place[-1]] != "other" else None
        forged = {**bundle, "dsseEnvelope": {**bundle["dsseEnvelope"], "payload": text64(json.dumps(changed).encode())}}
        assert refusal(json.dumps(forged).encode()), place


def test_every_byte_of_payload_and_signature_counts(tmp_path: Path) -> None:
    deliver(tmp_path)
    bundle = json.loads((tmp_path / ATTESTATION_FILE).read_text())
    envelope = bundle["dsseEnvelope"]
    payload, signature = base64.b64decode(envelope["payload"]), base64.b64decode(envelope["signatures"][0]["sig"])
    for data, name in ((payload, "payload"), (signature, "sig")):
        for at in range(0, len(data), max(1, len(data) // 50)):
            changed = bytearray(data)
            changed[at] ^= 4
            other = json.loads(json.dumps(bundle))
            part = other["dsseEnvelope"] if name == "payload" else other["dsseEnvelope"]["signatures"][0]
            part[name] = text64(bytes(changed))
            assert refusal(json.dumps(other).encode()), (name, at)


def test_a_statement_by_another_key_is_refused(tmp_path: Path) -> None:
    other = private_key_from(secrets.token_bytes(64))
    deliver(tmp_path, other)
    raw = (tmp_path / ATTESTATION_FILE).read_bytes()
    assert "signed by the key" in refusal(raw)
    relabelled = json.loads(raw)
    hint = json.loads(json.dumps(sign_statement({}, KEY)))["verificationMaterial"]
    relabelled["verificationMaterial"] = hint
    assert "does not fit" in refusal(json.dumps(relabelled).encode())
    both = public_pem(KEY.public_key()) + public_pem(other.public_key())
    assert verify_folder(tmp_path, read_public_keys(both))[0].faults == ()


@pytest.mark.parametrize("raw", [b"", b"{}", b"[1]", b'{"dsseEnvelope": 3}', b"\xff", b"[" * 10_000])
def test_what_is_no_bundle_is_refused(raw: bytes) -> None:
    assert refusal(raw)


@pytest.mark.parametrize("pem", [b"", b"text", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"])
def test_what_is_no_key_is_refused(pem: bytes) -> None:
    with pytest.raises(NightpressError) as refused:
        read_public_keys(pem)
    assert refused.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.slow
def test_the_tool_of_model_signing_checks_the_same_file(tmp_path: Path) -> None:
    from model_signing.verifying import Config

    folder = tmp_path / "artifact"
    folder.mkdir()
    deliver(folder)
    (tmp_path / "key.pem").write_bytes(public_pem(KEY.public_key()))
    config = Config().use_elliptic_key_verifier(public_key=tmp_path / "key.pem")
    config.verify(folder, folder / ATTESTATION_FILE)
    flip("model.onnx")(folder)
    with pytest.raises(ValueError, match=r"model\.onnx"):
        Config().use_elliptic_key_verifier(public_key=tmp_path / "key.pem").verify(folder, folder / ATTESTATION_FILE)


def refusal(raw: bytes) -> str:
    with pytest.raises(NightpressError) as refused:
        read_bundle(raw, [KEY.public_key()])
    assert refused.value.code is ErrorCode.NOT_AUTHENTIC
    return refused.value.message


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()
