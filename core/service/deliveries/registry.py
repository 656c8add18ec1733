"""Delivers to an OCI registry: an artifact of the CNCF ModelPack format, which `oras pull` and ModelPack's tools fetch.

By the requests of the OCI Distribution Specification 1.1. Blobs are named by their digest, so a blob that is there isn't sent again; the
manifest has the same bytes at each attempt; and a blob that was sent in part goes on after its last whole request. A registry may forget a
blob whose request breaks off, as CNCF Distribution does: then that blob is sent again.
"""

import base64
import hashlib
import ipaddress
import json
import math
import re
import time
from typing import Any

import httpx

from nightpress.core.errors import NightpressError
from nightpress.core.handoff.manifest import ATTESTATION_FILE
from nightpress.core.outbound import is_within
from nightpress.core.service.deliveries.addresses import RegistryAddress
from nightpress.core.service.deliveries.exchange import Exchange, sent_whole
from nightpress.core.service.deliveries.failures import refused, unavailable
from nightpress.core.service.deliveries.package import Item, Package, Progress
from nightpress.core.settings import Settings

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
_CONFIG = "application/vnd.cncf.model.config.v1+json"
_LAYER = "application/vnd.cncf.model.{}.v1.raw"
_PIECE = 16 * 1024**2  #: bytes of one request
_TOKEN_LIFE_S = 60.0  #: unless the token service says otherwise
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_WEIGHTS = (".safetensors", ".gguf", ".onnx", ".onnx_data", ".bin", ".xml", ".pt2", ".pt")
_DOCUMENTS = (".md", ".html", ".txt")


class RegistrySender:
    """Pushes blobs and then the manifest, under the address's tag."""

    def __init__(self, address: RegistryAddress, secrets: dict[str, str], settings: Settings) -> None:
        self._address = address
        self._url = f"oci://{address.host}/{address.name}:{address.tag}"
        self._secrets = secrets
        self._plain_http = _speaks_http(address.host, settings)
        scheme = "http" if self._plain_http else "https"
        self._base = httpx.URL(f"{scheme}://{address.host}/v2/{address.name}/")
        self._authorization: dict[str, str] = {}
        self._authorized_until = 0.0  #: monotonic; tokens live for a minute or some
        self._exchange = Exchange(self._url, settings)

    def close(self) -> None:
        self._exchange.close()

    def send(self, package: Package, progress: Progress) -> dict[str, Any]:
        for item in package.items:
            self._push(item, progress)
        config = _config_of(package)
        self._push(_item("config.json", config), None)
        manifest = _manifest_of(package, config)
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        self._ask("PUT", f"manifests/{self._address.tag}", content=manifest, headers={"Content-Type": _MANIFEST})
        url = f"{self._address.host}/{self._address.name}:{self._address.tag}"
        return {"url": url, "digest": digest, "files": len(package.items), "bytes": package.size}

    def _push(self, item: Item, progress: Progress | None) -> None:
        digest = f"sha256:{item.sha256}"
        # A redirect leads to a blob that is there.
        if self._ask("HEAD", f"blobs/{digest}", accept=frozenset({302, 307, 404})).status_code != 404:
            if progress:
                progress.claim.skip(item.size)
                progress.keep(item.path, {}) if progress.of(item.path) else None
            return
        location, start = self._resumed(item, progress)
        try:
            self._push_from(start, location or self._location(self._ask("POST", "blobs/uploads/")), item, progress)
        except NightpressError as error:
            if location and progress and not error.kind.retryable:  # the next attempt begins a new upload
                progress.keep(item.path, {})
                raise unavailable(self._url, f"the open upload of {item.path} is no longer accepted") from error
            raise

    def _push_from(self, start: int, location: str, item: Item, progress: Progress | None) -> None:
        digest = f"sha256:{item.sha256}"
        if progress and start:
            progress.claim.skip(start)
        while start < item.size:
            end = min(start + _PIECE, item.size)
            body = sent_whole(item, start, end, progress.claim) if progress else item.content()
            span = {"Content-Range": f"{start}-{end - 1}", "Content-Length": str(end - start)}
            kind = {"Content-Type": "application/octet-stream"}
            location = self._location(self._ask("PATCH", location, content=body, headers={**kind, **span}))
            start = end
            if progress and item.size > _PIECE:
                progress.keep(item.path, {"location": location})
        self._ask("PUT", _with_query(location, digest=digest), headers={"Content-Length": "0"})
        if progress and progress.of(item.path):
            progress.keep(item.path, {})

    def _resumed(self, item: Item, progress: Progress | None) -> tuple[str | None, int]:
        """The open upload of an earlier attempt, and how many of its bytes have arrived. (None, 0): there is none."""
        location = progress.of(item.path).get("location") if progress else None
        if not location:
            return None, 0
        try:
            answer = self._ask("GET", location)
            _, _, last = answer.headers["range"].partition("-")
            return self._location(answer), int(last) + 1 if int(last) else 0
        except (NightpressError, KeyError, ValueError):
            return None, 0  # it has expired

    def _location(self, answer: httpx.Response) -> str:
        try:
            target = self._base.join(answer.headers["location"])
        except (KeyError, httpx.InvalidURL) as error:
            raise self._exchange.malformed(error) from error
        return str(target)

    def _ask(self, method: str, url: str, *, headers: dict[str, str] | None = None, **request: Any) -> httpx.Response:
        """Send a request, and answer the registry's challenge. Only the registry itself gets the credentials."""
        target = self._base.join(url)
        own = (target.scheme, target.host, target.port) == (self._base.scheme, self._base.host, self._base.port)
        accept = request.pop("accept", frozenset())
        if own and time.monotonic() >= self._authorized_until:
            self._authorize()
        given = {**(headers or {}), **(self._authorization if own else {})}
        return self._exchange.ask(method, target, headers=given, accept=accept, **request)

    def _authorize(self) -> None:
        """Ask for the registry's challenge and answer it: by Basic, or with a token of the service that it names (Docker's token scheme)."""
        answer = self._exchange.ask("GET", self._base.join("/v2/"), accept=frozenset({401}))
        self._authorized_until = math.inf
        if answer.status_code != 401:
            return
        scheme, _, rest = answer.headers.get("www-authenticate", "").partition(" ")
        if scheme.lower() == "basic":
            self._authorization = {"Authorization": self._basic()}
            return
        said = dict(_CHALLENGE.findall(rest))
        if scheme.lower() != "bearer" or "realm" not in said:
            raise refused(self._url, "it asks for a kind of authentication that is not known here")
        asked = {key: said[key] for key in ("service",) if key in said}
        asked["scope"] = f"repository:{self._address.name}:pull,push"
        realm = httpx.URL(said["realm"])
        if realm.scheme != "https" and not self._plain_http:
            raise refused(self._url, "it sends to a token service without TLS")
        token = self._exchange.ask("GET", realm.copy_merge_params(asked), headers={"Authorization": self._basic()})
        try:
            found = token.json()
            self._authorization = {"Authorization": f"Bearer {found.get('token') or found['access_token']}"}
            life_s = float(found.get("expires_in") or _TOKEN_LIFE_S)
            self._authorized_until = time.monotonic() + life_s / 2
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._exchange.malformed(error) from error

    def _basic(self) -> str:
        pair = f"{self._secrets['username']}:{self._secrets['password']}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


def _speaks_http(host: str, settings: Settings) -> bool:
    """Whether a registry is reached without TLS: by its address, or as localhost, in a network that the operator allowed."""
    name = "127.0.0.1" if (bare := host.partition(":")[0]).lower() == "localhost" else bare
    try:
        return is_within(ipaddress.ip_address(name), settings.destination_networks)
    except ValueError:
        return False


def _config_of(package: Package) -> bytes:
    """ModelPack's config: what the model is, and the digests of its layers in order."""
    return _json(
        {
            "descriptor": {"createdAt": package.finished_at, "name": package.model, "title": package.title},
            "config": {"format": package.artifact},
            "modelfs": {"type": "layers", "diffIds": [f"sha256:{item.sha256}" for item in package.items]},
        }
    )


def _manifest_of(package: Package, config: bytes) -> bytes:
    layers = [
        {
            "mediaType": _LAYER.format(_kind(item.path)),
            "digest": f"sha256:{item.sha256}",
            "size": item.size,
            "annotations": {"org.cncf.model.filepath": item.path, "org.opencontainers.image.title": item.path},
        }
        for item in package.items
    ]
    described = {"mediaType": _CONFIG, "digest": f"sha256:{hashlib.sha256(config).hexdigest()}", "size": len(config)}
    notes = {
        "org.opencontainers.image.created": package.finished_at,
        "org.opencontainers.image.title": package.title,
        "nightpress.job": package.job_id,
    }
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": _ARTIFACT,
            "config": described,
            "layers": layers,
            "annotations": notes,
        }
    )


def _kind(path: str) -> str:
    """The kind of a layer in ModelPack: weights, their configuration, or documents."""
    if path.endswith(_WEIGHTS):
        return "weight"
    return "doc" if path.endswith(_DOCUMENTS) or path == ATTESTATION_FILE else "weight.config"


def _item(path: str, data: bytes) -> Item:
    return Item(path, len(data), hashlib.sha256(data).hexdigest(), lambda start, end: iter((data[start:end],)))


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _with_query(url: str, **params: str) -> str:
    return str(httpx.URL(url).copy_merge_params(params))
