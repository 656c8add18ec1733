"""The OpenID Connect provider: its discovery document, its keys, and the requests of a sign-in.

Both documents are kept for an hour, and for a day while the provider does not answer. An unknown key has the keys fetched again,
at most every thirty seconds.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings
from nightpress.core.version import VERSION

_PATIENCE_S = 5.0
_FRESH_S = 3600.0
_STALE_S = 24 * 3600.0
_KEYS_AGAIN_S = 30.0
_REST_S = 5.0  #: after a fetch that failed, so that no request waits for a provider that is away
_MAX_BYTES = 1024**2
_BASIC = ("client_secret_basic",)  #: what a provider takes that does not say what it takes


class ProviderRefusal(Exception):  # noqa: N818 - an outcome that every caller handles
    """The provider answered with an OAuth error, e.g. `invalid_grant`: the code or the refresh token no longer counts."""


@dataclass(frozen=True)
class Endpoints:
    """What Nightpress needs of the discovery document."""

    authorization: str
    token: str
    jwks: str
    userinfo: str | None
    secret_in_form: bool  #: whether the client's secret goes into the form, because the provider takes it nowhere else
    tells_issuer: bool  #: whether the redirect back carries `iss` (RFC 9207)


@dataclass(frozen=True)
class Answered:
    """The tokens of a sign-in or of a refresh."""

    id_token: str | None
    access_token: str
    refresh_token: str | None


class Provider:
    """Safe to share between threads. Every request ends within five seconds."""

    def __init__(self, settings: Settings) -> None:
        self.issuer = settings.oidc_issuer
        self.redirect_uri = f"{settings.public_url.rstrip('/')}/auth/callback"
        self._client_id = settings.oidc_client_id
        self._secret = settings.oidc_client_secret.get_secret_value() if settings.oidc_client_secret else None
        self._scope = " ".join(settings.oidc_scopes)
        self._prompt = {"prompt": settings.oidc_prompt} if settings.oidc_prompt else {}
        self._http = httpx.Client(timeout=_PATIENCE_S, headers={"User-Agent": f"nightpress/{VERSION}"})
        self._metadata = _Kept(self._fetch_metadata)
        self._keys = _Kept(self._fetch_keys)

    def close(self) -> None:
        self._http.close()

    def endpoints(self) -> Endpoints:
        """Raises NightpressError(source_unavailable) if the provider has never answered, or answers something else."""
        raw = self._metadata.get()
        return Endpoints(
            authorization=_safe(raw, "authorization_endpoint"),
            token=_safe(raw, "token_endpoint"),
            jwks=_safe(raw, "jwks_uri"),
            userinfo=_safe(raw, "userinfo_endpoint") if "userinfo_endpoint" in raw else None,
            secret_in_form="client_secret_basic" not in raw.get("token_endpoint_auth_methods_supported", _BASIC),
            tells_issuer=raw.get("authorization_response_iss_parameter_supported") is True,
        )

    def keys(self, *, again: bool = False) -> list[dict[str, Any]]:
        """The public keys that the provider signs with, as JWKs. `again`: ask for them anew, because one is missing."""
        found = self._keys.get(at_most_old_s=_KEYS_AGAIN_S if again else _FRESH_S)
        return [key for key in found.get("keys", []) if isinstance(key, dict)]

    def authorization_url(self, *, state: str, nonce: str, verifier: str) -> str:
        """Where the browser goes to sign in. `verifier`: of PKCE (RFC 7636); only its hash goes along."""
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            "response_type": "code",
            "client_id": self._client_id,
            "redirect_uri": self.redirect_uri,
            "scope": self._scope,
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
            **self._prompt,
        }
        return str(httpx.URL(self.endpoints().authorization).copy_merge_params(query))

    def exchange(self, code: str, verifier: str) -> Answered:
        """Turn a code into tokens. Raises ProviderRefusal, and NightpressError(source_unavailable)."""
        more = {"code": code, "code_verifier": verifier, "redirect_uri": self.redirect_uri}
        return self._ask({"grant_type": "authorization_code", **more})

    def refresh(self, refresh_token: str) -> Answered:
        """Get new tokens. Raises ProviderRefusal, and NightpressError(source_unavailable)."""
        return self._ask({"grant_type": "refresh_token", "refresh_token": refresh_token})

    def userinfo(self, access_token: str) -> Mapping[str, Any]:
        """Claims about the person. Empty where the provider has no such endpoint. Raises as `refresh` does."""
        url = self.endpoints().userinfo
        if url is None:
            return {}
        try:
            response = self._http.get(url, headers={"Authorization": f"Bearer {access_token}"})
        except httpx.TransportError as error:
            raise _away(self.issuer, error) from error
        if response.status_code in {401, 403}:
            raise ProviderRefusal("the provider refused the access token")
        return _document(self.issuer, response)

    def _ask(self, form: dict[str, str]) -> Answered:
        """Send a request for tokens, as this client (RFC 6749 §2.3.1)."""
        endpoints = self.endpoints()
        headers = {"Accept": "application/json"}
        if self._secret is None:
            form = {**form, "client_id": self._client_id}
        elif endpoints.secret_in_form:
            form = {**form, "client_id": self._client_id, "client_secret": self._secret}
        else:
            both = f"{quote(self._client_id, safe='')}:{quote(self._secret, safe='')}"
            headers["Authorization"] = f"Basic {base64.b64encode(both.encode()).decode()}"
        try:
            response = self._http.post(endpoints.token, data=form, headers=headers)
        except httpx.TransportError as error:
            raise _away(self.issuer, error) from error
        if response.status_code in {400, 401, 403}:
            raise ProviderRefusal(f"the provider answered {response.status_code}")
        raw = _document(self.issuer, response)
        if "access_token" not in raw:
            raise ProviderRefusal("the provider sent no access token")
        return Answered(raw.get("id_token"), str(raw["access_token"]), raw.get("refresh_token"))

    def _fetch_metadata(self) -> dict[str, Any]:
        found = self._get(f"{self.issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != self.issuer:
            raise NightpressError(
                ErrorCode.SOURCE_UNAVAILABLE,
                f"The provider calls itself {str(found.get('issuer'))[:200]!r}, not {self.issuer!r}.",
                hint="Set NIGHTPRESS_OIDC_ISSUER to exactly the issuer that its discovery document names.",
            )
        return found

    def _fetch_keys(self) -> dict[str, Any]:
        return self._get(self.endpoints().jwks)

    def _get(self, url: str) -> dict[str, Any]:
        try:
            return _document(self.issuer, self._http.get(url))
        except httpx.TransportError as error:
            raise _away(self.issuer, error) from error


class _Kept:
    """A document that is fetched when it is old. A fetch that fails leaves the old document in use for a day."""

    def __init__(self, fetch: Callable[[], dict[str, Any]]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._found: dict[str, Any] | None = None
        self._fetched_at = self._tried_at = float("-inf")
        self._failure: NightpressError | None = None

    def get(self, *, at_most_old_s: float = _FRESH_S) -> dict[str, Any]:
        """Raises the failure of the last fetch while there is no document that can be used."""
        with self._lock:
            now = time.monotonic()
            if now - self._tried_at >= (_REST_S if self._failure else at_most_old_s):
                self._tried_at = now
                try:
                    self._found, self._fetched_at, self._failure = self._fetch(), now, None
                except NightpressError as error:
                    self._failure = error
            if self._found is None or now - self._fetched_at > _STALE_S:
                assert self._failure is not None
                raise self._failure
            return self._found


def _document(issuer: str, response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer. Raises NightpressError(source_unavailable) for anything else."""
    try:
        found = json.loads(response.content) if response.is_success and len(response.content) <= _MAX_BYTES else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _away(issuer, f"it answered {response.status_code} without a JSON object")
    return found


def _safe(raw: Mapping[str, Any], name: str) -> str:
    """An endpoint's address. It must be encrypted like the issuer's."""
    value = raw.get(name)
    secure = isinstance(value, str) and (
        urlsplit(value).scheme == "https" or urlsplit(str(raw["issuer"])).scheme == "http"
    )
    if not secure:
        raise _away(str(raw.get("issuer")), f"its discovery document has no usable {name}")
    return str(value)


def _away(issuer: str, why: object) -> NightpressError:
    return NightpressError(
        ErrorCode.SOURCE_UNAVAILABLE,
        f"The provider {issuer} can't be used: {why}.",
        hint="Check NIGHTPRESS_OIDC_ISSUER and that this machine reaches it. API keys work without it.",
    )
