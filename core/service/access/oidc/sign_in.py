"""Signing in by OpenID Connect: the page's authorization code with PKCE, and tokens that come with a request."""

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.keys import Person, Principal
from nightpress.core.service.access.oidc.groups import GroupRules, groups_in
from nightpress.core.service.access.oidc.people import PeopleBook
from nightpress.core.service.access.oidc.provider import Provider, ProviderRefusal
from nightpress.core.service.access.oidc.sealing import Seal
from nightpress.core.service.access.oidc.sessions import SIGN_IN_S, Confirmed, DueSession, SessionBook
from nightpress.core.service.access.oidc.tokens import Claims, TokenChecker
from nightpress.core.settings import Settings
from nightpress.core.wire.access import ProviderView

_BEARER_CACHE_S = 60.0
_CACHE_SIZE = 10_000
#: Where the page goes on. Only what stands behind the #, so that it leads to no other site.
_PLACE = re.compile(r"#/[A-Za-z0-9/_.:=&?%~-]{0,500}")


class Begun(NamedTuple):
    """The provider's address, and the cookie that binds the sign-in to this browser."""

    url: str
    cookie: str


class Finished(NamedTuple):
    """The session's cookie, and where the page goes on."""

    cookie: str
    place: str


class SignIn:
    """Safe to share between threads. Every method may wait for the provider for some seconds."""

    def __init__(
        self, settings: Settings, people: PeopleBook, sessions: SessionBook, key_for: Callable[[str], bytes]
    ) -> None:
        self.provider = Provider(settings)
        self._tokens = TokenChecker(self.provider, settings)
        self._rules = GroupRules(settings.oidc_groups)
        self._claim = settings.oidc_groups_claim
        self._people = people
        self._sessions = sessions
        self._sign_ins = Seal(key_for("oidc/sign-ins"))
        self._refresh = Seal(key_for("oidc/refresh-tokens"))
        self._about = ProviderView(
            name=settings.oidc_name,
            issuer=settings.oidc_issuer,
            client_id=settings.oidc_cli_client_id or settings.oidc_client_id,
            scopes=settings.oidc_scopes,
        )
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str | None], tuple[Principal, float]] = {}

    def close(self) -> None:
        self.provider.close()

    def about(self) -> ProviderView:
        return self._about

    # The page ----------------------------------------------------------------------------------------------------

    def begin(self, place: str, tenant_id: str | None) -> Begun:
        """Begin a sign-in. `place`: where the page goes on, e.g. `#/jobs`. Nothing is stored: the cookie holds it, encrypted."""
        pending = {
            "state": secrets.token_urlsafe(32),
            "nonce": secrets.token_urlsafe(32),
            "verifier": secrets.token_urlsafe(48),
        }
        url = self.provider.authorization_url(**pending)
        more = {"place": place if _PLACE.fullmatch(place) else "#/jobs", "tenant": tenant_id}
        return Begun(url, self._sign_ins.close({**pending, **more, "until": time.time() + SIGN_IN_S}))

    def finish(self, answer: Mapping[str, str], cookie: str | None, *, session: str | None) -> Finished:
        """Finish a sign-in with what the provider sent back. `cookie`: that of `begin`; `session`: the browser's session so far.

        Raises NightpressError: unauthenticated if it isn't an answer to this browser's sign-in or comes too late, conflict for a second
        time, forbidden for a person without a group, and source_unavailable.
        """
        pending = self._pending(answer, cookie)
        if "code" not in answer:
            raise _refused("the provider did not sign you in")
        try:
            tokens = self.provider.exchange(answer["code"], pending["verifier"])
        except ProviderRefusal as error:
            raise _refused("the provider no longer knows this sign-in") from error
        if tokens.id_token is None:
            raise _refused("the provider sent no ID token: the scope `openid` is missing")
        claims = self._tokens.check_id_token(tokens.id_token, nonce=pending["nonce"])
        person_id, _, _ = self._people.know(claims)
        groups = self._groups(claims, tokens.access_token)
        tenant_id = self._rules.choose(groups, pending["tenant"])
        kept = self._refresh.close({"token": tokens.refresh_token}) if tokens.refresh_token else None
        confirmed = Confirmed(person_id, self._rules.known(groups), kept)
        made = self._sessions.begin(confirmed, tenant_id, state=pending["state"], replaces=session)
        return Finished(made, pending["place"])

    def _pending(self, answer: Mapping[str, str], cookie: str | None) -> dict[str, Any]:
        """What `begin` noted, if the answer belongs to it."""
        pending = self._sign_ins.open(cookie) if cookie else None
        if pending is None:
            raise _refused("this browser began no sign-in, or too long ago")
        if not hmac.compare_digest(answer.get("state", "").encode(), pending["state"].encode()):
            raise _refused("it belongs to another sign-in")
        if time.time() > pending["until"]:
            raise _refused("it took longer than ten minutes")
        told = answer.get("iss")
        if told != self.provider.issuer and (told is not None or self.provider.endpoints().tells_issuer):
            raise _refused("another provider has answered")
        return pending

    def _groups(self, claims: Claims, access_token: str) -> frozenset[str]:
        """A person's groups: from the ID token, or else from the provider's userinfo."""
        found = groups_in(claims, self._claim)
        if found is None:
            told = self.provider.userinfo(access_token)
            # The answer is about the person whom the access token is for; take it for nobody else (OpenID Connect Core 5.3.2).
            found = groups_in(told, self._claim) if told.get("sub") == claims["sub"] else None
        return found or frozenset()

    # Tokens ------------------------------------------------------------------------------------------------------

    def cached(self, token: str, tenant_id: str | None) -> Principal | None:
        """The token's principal if it was checked within the last minute, without SQL; else None."""
        found = self._known.get((_digest(token), tenant_id))
        return found[0] if found is not None and time.time() < found[1] else None

    def authenticate(self, token: str, tenant_id: str | None) -> Principal:
        """The principal of an ID token or a JWT access token. `tenant_id`: where to act; None: in the first of the person's tenants.

        Raises NightpressError(unauthenticated, forbidden, source_unavailable).
        """
        claims = self._tokens.check_bearer(token)
        groups = groups_in(claims, self._claim) or frozenset()
        tenant = self._rules.choose(groups, tenant_id)
        allowed = self._rules.scopes_by_tenant(groups)
        person_id, name, email = self._people.know(claims)
        principal = Principal(
            tenant, person_id, allowed[tenant], person_id, Person(person_id, name, email, tuple(allowed))
        )
        until = min(float(claims["exp"]), time.time() + _BEARER_CACHE_S)
        with self._lock:
            if len(self._known) >= _CACHE_SIZE:
                self._known.clear()
            self._known[_digest(token), tenant_id] = (principal, until)
        return principal

    # The control process -----------------------------------------------------------------------------------------

    def confirm_due(self, at_most: int = 100) -> None:
        """Ask the provider about sessions whose groups are due. A group that is gone, or a refusal, ends a session.

        Raises NightpressError(source_unavailable) while the provider is away; the sessions are due again after a minute.
        """
        for _ in range(at_most):
            due = self._sessions.take_due()
            if due is None:
                return
            self._confirm(due)

    def _confirm(self, due: DueSession) -> None:
        kept = self._refresh.open(due.refresh_token)
        if kept is None:  # the installation's key has changed
            self._sessions.give_up(due, "refused")
            return
        try:
            tokens = self.provider.refresh(kept["token"])
            claims: Claims = {"iss": due.issuer, "sub": due.subject}
            if tokens.id_token is not None:
                claims = self._tokens.check_id_token(tokens.id_token, nonce=None)
            groups = self._groups(claims, tokens.access_token)
        except ProviderRefusal:
            self._sessions.give_up(due, "refused")
            return
        except NightpressError as error:
            if error.code is ErrorCode.UNAUTHENTICATED:
                self._sessions.give_up(due, "refused")
                return
            raise
        if claims["sub"] != due.subject or claims["iss"] != due.issuer:
            self._sessions.give_up(due, "refused")
        elif due.tenant_id not in self._rules.scopes_by_tenant(groups):
            self._sessions.give_up(due, "no_group")
        else:
            renewed = self._refresh.close({"token": tokens.refresh_token or kept["token"]})
            self._sessions.confirm(due, self._rules.known(groups), renewed)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _refused(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNAUTHENTICATED, f"You are not signed in: {why}.", hint="Begin again with the page's button."
    )
