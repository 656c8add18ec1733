"""The signed statement of an artifact: what it was made from, how, and what was measured.

It is an in-toto statement (in-toto.io/Statement/v1) in a DSSE envelope in a Sigstore bundle, signed by an ECDSA P-256 key. Its predicate is
that of OpenSSF Model Signing v1.0, so that `model_signing verify key` checks the same file. Verifiers of that format ignore other fields of
the predicate: ours stand under `nightpress`.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import ATTESTATION_FILE, FileEntry, digest_of
from nightpress.core.handoff.report import Report, Subject

#: names under which an artifact's folder may hold the job's report → the report's own name
REPORT_NAMES = {
    "README.md": "report.md",
    "report.md": "report.md",
    "report.html": "report.html",
    "report.json": "report.json",
}
#: files of an artifact's folder that are no part of the model. Of these, the reports are checked by `nightpress`'s own fields.
IGNORED = (ATTESTATION_FILE, *REPORT_NAMES, ".git", ".gitattributes", ".github", ".gitignore", ".cache")

_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_MAX_BYTES = 64 * 1024**2
_CURVE = ec.SECP256R1
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True)
class SignedArtifact:
    """What a statement says of its artifact, after its signature was checked."""

    key_id: str
    files: Mapping[str, str]  #: path → SHA-256
    reports: Mapping[str, str]  #: report.json, report.md, report.html → SHA-256
    claims: Mapping[str, Any]  #: the fields under `nightpress`


def make_statement(
    report: Report,
    subject: Subject,
    files: Sequence[FileEntry],
    report_files: Sequence[FileEntry],
    *,
    engine: str | None,
) -> dict[str, Any]:
    """The statement of the artifact that `subject` describes. engine: the version of the code that made it.

    Raises ValueError if the report is of another artifact.
    """
    digest = digest_of(list(files))
    if subject.digest not in {digest, None}:
        raise ValueError(f"the report is of {subject.digest}, the files are {digest}")
    ordered = sorted(files, key=lambda file: file.path)
    root = hashlib.sha256(b"".join(bytes.fromhex(file.sha256) for file in ordered)).hexdigest()
    claims = {
        "job": report.job_id,
        "artifact": {
            "name": subject.name,
            "format": subject.format,
            "digest": digest,
            "size": subject.size_bytes,
        },
        "source": {"name": report.model.get("name"), "digest": report.model.get("digest")},
        "recipe": report.recipe,
        "engine": engine,
        "environment": report.environment,
        "data": [{"ref": used.ref, "sha256": used.sha256} for used in report.data],
        "figures": [measured.model_dump(mode="json") for measured in subject.measurements],
        "slices": [part.model_dump(mode="json") for part in subject.slices],
        "source_figures": [measured.model_dump(mode="json") for measured in report.source.measurements],
        "timings": [timing.model_dump(mode="json") for timing in subject.timings],
        "generation": [timing.model_dump(mode="json") for timing in subject.generation],
        "gates": [gate.model_dump(mode="json") for gate in report.gates],
        "verdict": report.verdict,
        "reports": {file.path: file.sha256 for file in report_files},
    }
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": subject.name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": True,  # a cache of the Hub holds links to its files
                "ignore_paths": list(IGNORED),
            },
            "resources": [{"name": file.path, "algorithm": "sha256", "digest": file.sha256} for file in ordered],
            "nightpress": claims,
        },
    }


def private_key_from(seed: bytes) -> ec.EllipticCurvePrivateKey:
    """The P-256 key that belongs to at least 48 random bytes (FIPS 186-5, A.2.1: by extra random bits)."""
    return ec.derive_private_key(int.from_bytes(seed, "big") % (_ORDER - 1) + 1, _CURVE())


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_id_of(key: ec.EllipticCurvePublicKey) -> str:
    """The SHA-256 of the key's PEM form, as Model Signing names keys."""
    return hashlib.sha256(public_pem(key)).hexdigest()


def read_public_keys(pem: bytes) -> list[ec.EllipticCurvePublicKey]:
    """The P-256 keys in a file of PEM blocks. Raises NightpressError(invalid_request)."""
    end = b"-----END PUBLIC KEY-----"
    try:
        keys = [serialization.load_pem_public_key(block + end) for block in pem.split(end)[:-1]]
    except ValueError as error:
        raise _no_keys() from error
    known = [key for key in keys if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVE)]
    if not known or len(known) != len(keys):
        raise _no_keys()
    return known


def sign_statement(statement: Mapping[str, Any], key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    """The Sigstore bundle of a statement."""
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    signature = key.sign(_pae(payload), ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    return {
        "mediaType": _BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key_id_of(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }


def read_bundle(raw: bytes, keys: Iterable[ec.EllipticCurvePublicKey]) -> SignedArtifact:
    """Check a bundle's signature and read its statement. Raises NightpressError(not_authentic)."""
    known = {key_id_of(key): key for key in keys}
    try:
        if len(raw) > _MAX_BYTES:
            raise ValueError("it is too long")
        bundle = json.loads(raw)
        envelope = bundle["dsseEnvelope"]
        hint = str(bundle["verificationMaterial"]["publicKey"]["hint"])
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        if envelope["payloadType"] != _PAYLOAD_TYPE:
            raise ValueError(f"its payload is {envelope['payloadType']!r:.100}")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, binascii.Error) as error:
        raise not_authentic(f"its bundle can't be read ({error!s:.200})") from error
    if hint not in known:
        raise not_authentic(
            f"it is signed by the key {hint[:16]}…, and only {', '.join(f'{key[:16]}…' for key in known) or 'no key'} was given"
        )
    try:
        known[hint].verify(signature, _pae(payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise not_authentic("its signature does not fit its statement: one of them was changed") from error
    return _read_statement(payload, hint)


def _read_statement(payload: bytes, key_id: str) -> SignedArtifact:
    try:
        statement = json.loads(payload)
        predicate = statement["predicate"]
        if statement["_type"] != _STATEMENT_TYPE or statement["predicateType"] != _PREDICATE_TYPE:
            raise ValueError("it is a statement of another kind")
        files = {str(entry["name"]): str(entry["digest"]) for entry in predicate["resources"]}
        claims = dict(predicate["nightpress"])
        reports = {str(name): str(digest) for name, digest in claims["reports"].items()}
        root = hashlib.sha256(b"".join(bytes.fromhex(files[path]) for path in sorted(files))).hexdigest()
        if statement["subject"][0]["digest"]["sha256"] != root:
            raise ValueError("its digest is not that of its files")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise not_authentic(f"its statement can't be read ({error!s:.200})") from error
    return SignedArtifact(key_id, files, reports, claims)


def not_authentic(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.NOT_AUTHENTIC,
        f"The artifact is not shown to be authentic: {why}.",
        hint="Fetch it again. If you gave a key, compare it with `nightpress signing-keys` of the service that made it.",
    )


def _no_keys() -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_REQUEST,
        "The file holds no public key, or one of another kind.",
        hint="Give the PEM file that `nightpress signing-keys --out FILE` writes.",
    )


def _pae(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding (github.com/secure-systems-lab/dsse, protocol.md)."""
    kind = _PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
