"""Checks the tokens that the provider signs: algorithm, key, issuer, audience and times (RFC 7519, RFC 8725, OpenID Connect Core 3.1.3.7)."""

import hmac
from collections.abc import Collection, Mapping
from typing import Any, cast

from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet, RSAKey

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.oidc.provider import Provider
from nightpress.core.settings import Settings

_MAX_LENGTH = 16 * 1024
_LEEWAY_S = 60
#: Types of tokens that identify a person; others, e.g. logout tokens, are signed by the same keys.
_TYPES = frozenset({"", "jwt", "at+jwt", "application/at+jwt"})
#: First letters of an algorithm → the type of key it needs. Keys of other types, above all `oct`, are never used.
_KEY_TYPES = {"RS": "RSA", "PS": "RSA", "ES": "EC"}

Claims = Mapping[str, Any]


class TokenChecker:
    """Checks tokens for one installation. `clients`: page and command line, to which ID tokens are issued."""

    def __init__(self, provider: Provider, settings: Settings) -> None:
        self._provider = provider
        self._algorithms = list(settings.oidc_algorithms)
        self._page = settings.oidc_client_id
        self._audiences = [self._page, settings.oidc_cli_client_id or self._page, *settings.oidc_audiences]

    def check_bearer(self, token: str) -> Claims:
        """The claims of a token that came with a request. Raises NightpressError(unauthenticated), and source_unavailable."""
        return self._check(token, self._audiences)

    def check_id_token(self, token: str, *, nonce: str | None) -> Claims:
        """The claims of an ID token that the page's client was given. `nonce`: that of the sign-in; None: after a refresh."""
        claims = self._check(token, [self._page])
        if claims.get("azp", self._page) != self._page:
            raise _invalid("it was issued to another client")
        if nonce is not None and not hmac.compare_digest(str(claims.get("nonce", "")).encode(), nonce.encode()):
            raise _invalid("it belongs to another sign-in")
        return claims

    def _check(self, token: str, audiences: Collection[str]) -> Claims:
        header = self._header(token)
        key = self._key(header, again=False) or self._key(header, again=True)
        if key is None:
            raise _invalid("no key of the provider has signed it")
        rules = jwt.JWTClaimsRegistry(
            leeway=_LEEWAY_S,
            iss={"essential": True, "value": self._provider.issuer},
            aud={"essential": True, "values": list(audiences)},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
        )
        try:
            claims = jwt.decode(token, key, algorithms=self._algorithms).claims
            rules.validate(claims)
        except (JoseError, ValueError, TypeError) as error:
            raise _invalid(str(error)) from error
        subject = claims["sub"]
        if not (0 < len(subject) <= 255 and subject.isascii() and subject.isprintable()):
            raise _invalid("its subject is not one of 1 to 255 ASCII characters")
        return claims

    def _header(self, token: str) -> dict[str, Any]:
        """The header, which is not trusted: it only chooses among the provider's keys and the allowed algorithms."""
        if len(token) > _MAX_LENGTH or token.count(".") != 2:
            raise _invalid("it is no signed JSON Web Token")
        try:
            header = dict(jws.extract_compact(token.encode()).headers())
        except (JoseError, ValueError, TypeError) as error:
            raise _invalid("it is no signed JSON Web Token") from error
        if header.get("alg") not in self._algorithms:
            raise _invalid(f"its algorithm {str(header.get('alg'))[:20]!r} is not allowed")
        if str(header.get("typ", "")).lower() not in _TYPES:
            raise _invalid("it is a token of another type")
        return header

    def _key(self, header: Mapping[str, Any], *, again: bool) -> RSAKey | ECKey | None:
        """The provider's key for this token. A token without `kid` is accepted where only a single key fits."""
        wanted, kind = header.get("kid"), _KEY_TYPES[header["alg"][:2]]
        fitting = [
            key
            for key in self._provider.keys(again=again)
            if key.get("kty") == kind
            and key.get("use", "sig") == "sig"
            and key.get("alg", header["alg"]) == header["alg"]
            and (wanted is None or key.get("kid") == wanted)
        ]
        if len(fitting) != 1:
            return None
        try:
            (key,) = KeySet.import_key_set(cast("Any", {"keys": fitting})).keys
        except (JoseError, ValueError, TypeError) as error:
            raise _invalid("the provider's key can't be read") from error
        return key if isinstance(key, RSAKey | ECKey) else None


def _invalid(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNAUTHENTICATED,
        f"The token is not valid: {why}.",
        hint="Sign in again: `nightpress login`, or the page's button.",
    )
