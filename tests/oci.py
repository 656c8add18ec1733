"""A real OCI registry for tests: Debian's `docker-registry`, on a free loopback port, with one user or with a token service."""

import base64
import datetime as dt
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.servers import _Server, _wait, free_port

PROGRAM = shutil.which("docker-registry")
needs_registry = pytest.mark.skipif(PROGRAM is None, reason="docker-registry is not installed (a package of Debian)")

USER = "nightpress"
PASSWORD = "registry-test-password"
#: bcrypt of PASSWORD
_HTPASSWD = "nightpress:$2y$05$abcdefghijklmnopqrstuudNXzMX.ckEqqJtXEWhsZxNCG/0RD6Bi"


class Registry(_Server):
    """The registry. `token_service`: the URL of a service whose tokens it takes; None: it knows USER by its password."""

    def __init__(self, folder: Path, token_service: "TokenService | None" = None) -> None:
        super().__init__(folder)
        self.host = f"127.0.0.1:{free_port()}"
        self._tokens = token_service

    def start(self) -> Self:
        assert PROGRAM is not None
        if self._tokens is None:
            (self.folder / "htpasswd").write_text(_HTPASSWD + "\n")
            auth = f"  htpasswd:\n    realm: test\n    path: {self.folder / 'htpasswd'}\n"
        else:
            (self.folder / "root.pem").write_bytes(self._tokens.certificate)
            auth = (
                f"  token:\n    realm: {self._tokens.url}\n    service: registry\n    issuer: tests\n"
                f"    rootcertbundle: {self.folder / 'root.pem'}\n"
            )
        config = self.folder / "config.yml"
        config.write_text(
            "version: 0.1\nlog:\n  level: warn\n"
            f"storage:\n  filesystem:\n    rootdirectory: {self.folder / 'data'}\n"
            f"http:\n  addr: {self.host}\n  secret: of-the-test\nauth:\n{auth}"
        )
        process = self._spawn([PROGRAM, "serve", str(config)], {"HOME": str(self.folder)})
        _wait(lambda: httpx.get(f"http://{self.host}/v2/", trust_env=False), process, self.log)
        return self


class TokenService:
    """Gives tokens for the registry, as the Docker token specification says, to USER only. It records the scopes that were asked for."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[str] = []
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
        now = dt.datetime.now(dt.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(1)
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self._der = made.public_bytes(serialization.Encoding.DER)
        self.certificate = made.public_bytes(serialization.Encoding.PEM)

    def token(self, scope: str) -> str:
        kind, name, actions = scope.split(":")
        now = dt.datetime.now(dt.UTC)
        claims = {
            "iss": "tests",
            "aud": "registry",
            "sub": USER,
            "iat": now - dt.timedelta(seconds=5),
            "nbf": now - dt.timedelta(seconds=5),
            "exp": now + dt.timedelta(minutes=5),
            "jti": "1",
            "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
        }
        return jwt.encode(claims, self._key, "ES256", headers={"x5c": [base64.b64encode(self._der).decode()]})


@contextmanager
def serve_tokens() -> Iterator[TokenService]:
    service = TokenService()
    right = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            [scope] = parse_qs(urlsplit(self.path).query)["scope"]
            service.asked.append(scope)
            granted = self.headers.get("Authorization") == right
            body = f'{{"token": "{service.token(scope)}", "expires_in": 1e-9}}'.encode() if granted else b"{}"
            self.send_response(200 if granted else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}/token"
    thread = threading.Thread(target=server.serve_forever, name="token service")
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
