"""Signs a person in on the command line: the device flow of OpenID Connect (RFC 8628), straight with the provider."""

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from nightpress.client.errors import ClientError
from nightpress.core.wire.access import ProviderView

_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_PATIENCE_S = 10.0
_POLL_S = _SLOW_DOWN_S = 5.0


@dataclass(frozen=True)
class Tokens:
    """What the provider gave. `expires_at`: Unix seconds, of the ID token, which the API is sent."""

    id_token: str
    expires_at: float
    refresh_token: str | None


@dataclass(frozen=True)
class Invitation:
    """What the person must do: open `url` in any browser and enter `code`. `direct`: an address with the code in it, if there is one."""

    url: str
    code: str
    direct: str | None


def token_url_of(issuer: str) -> str:
    """Where the provider refreshes tokens. Raises ClientError."""
    return str(_discover(issuer)["token_endpoint"])


def sign_in(provider: ProviderView, invite: Callable[[Invitation], None]) -> Tokens:
    """Run the flow to its end. `invite` shows the person what to do. Raises ClientError where it is refused or takes too long."""
    found = _discover(provider.issuer)
    if "device_authorization_endpoint" not in found:
        raise ClientError(
            f"{provider.issuer} doesn't offer the device flow.",
            hint="Make a key on the page, and store it with `nightpress servers add`.",
        )
    ask = {"client_id": provider.client_id, "scope": " ".join(provider.scopes)}
    begun = _post(found["device_authorization_endpoint"], ask)
    if "device_code" not in begun:
        raise _refusal(provider.issuer, begun)
    invite(Invitation(str(begun["verification_uri"]), str(begun["user_code"]), begun.get("verification_uri_complete")))
    pause, until = float(begun.get("interval", _POLL_S)), time.monotonic() + float(begun.get("expires_in", 600))
    poll = {"grant_type": _GRANT, "device_code": begun["device_code"], "client_id": provider.client_id}
    while time.monotonic() < until:
        time.sleep(pause)
        outcome = _post(found["token_endpoint"], poll)
        if "error" not in outcome:
            return _read(provider.issuer, outcome)
        if outcome["error"] == "slow_down":
            pause += _SLOW_DOWN_S
        elif outcome["error"] != "authorization_pending":
            raise _refusal(provider.issuer, outcome)
    raise ClientError("Nobody signed in before the code expired.", hint="Run `nightpress login` again.")


def refresh(issuer: str, token_url: str, client_id: str, refresh_token: str) -> Tokens:
    """Get new tokens. The refresh token may be a new one too. Raises ClientError where the sign-in has ended."""
    form = {"grant_type": "refresh_token", "refresh_token": refresh_token, "client_id": client_id}
    outcome = _post(token_url, form)
    if "error" in outcome:
        raise ClientError("Your sign-in has ended at the provider.", hint="Run `nightpress login` again.")
    return _read(issuer, {"refresh_token": refresh_token, **outcome})


def _read(issuer: str, outcome: dict[str, Any]) -> Tokens:
    token = outcome.get("id_token")
    if not isinstance(token, str):
        raise ClientError(f"{issuer} sent no ID token.", hint="Its client needs the scope `openid`.")
    try:
        payload = token.split(".")[1]
        # Read and not checked: the API checks it. A wrong time here only means a refresh too early or too late.
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return Tokens(token, float(claims["exp"]), outcome.get("refresh_token"))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ClientError(f"{issuer} sent an ID token that can't be read.", hint="Is it OpenID Connect?") from error


def _discover(issuer: str) -> dict[str, Any]:
    try:
        found = httpx.get(f"{issuer.rstrip('/')}/.well-known/openid-configuration", timeout=_PATIENCE_S).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ClientError(
            f"The provider {issuer} does not answer: {error}.", hint="Is this machine allowed to reach it?"
        ) from error
    if not isinstance(found, dict) or found.get("issuer") != issuer or "token_endpoint" not in found:
        raise ClientError(f"{issuer} is no OpenID Connect provider.", hint="Ask the operator of the service.")
    return found


def _post(url: str, form: dict[str, Any]) -> dict[str, Any]:
    """Send a form; the answer is an object with tokens or with `error`."""
    try:
        found = httpx.post(url, data=form, timeout=_PATIENCE_S, headers={"Accept": "application/json"}).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ClientError(f"The provider at {url} does not answer: {error}.", hint="Try again in a moment.") from error
    return found if isinstance(found, dict) else {"error": "invalid_answer"}


def _refusal(issuer: str, outcome: dict[str, Any]) -> ClientError:
    why = str(outcome.get("error_description") or outcome.get("error") or "it gave no reason")
    return ClientError(
        f"{issuer} refused the sign-in: {why}.", hint="Run `nightpress login` again, or ask the operator."
    )
