"""The page's sessions in SQL. A session ends when it is not used, when its time is over, at sign-out, and when the provider no longer confirms it.

| end | decided by |
|---|---|
| not used for SESSION_IDLE_S, or older than SESSION_S | the condition of every read |
| signed out, or ended by somebody with keys:write | a guarded update |
| a group that is gone, or a refresh token that is refused | the control process, every OIDC_RECHECK_S (checking.py) |
| not confirmed for OIDC_RECHECK_S and an hour: no refresh token, or the provider is away | the condition of every read |
"""

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, Update, and_, case, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from nightpress.core.database import db_now, statement, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.paging import newest_first
from nightpress.core.service.access.keys import Person, Principal
from nightpress.core.service.access.oidc.groups import GroupRules
from nightpress.core.service.tables.access import people, sessions
from nightpress.core.settings import Settings
from nightpress.core.wire.access import SessionView

SIGN_IN_S = 600.0  #: time that a person has at the provider
UNCONFIRMED_S = 3600.0  #: how long a session goes on after its groups should have been confirmed
_RETRY_S = 60.0  #: between two tries to confirm, and the time that one try is given
_CACHE_S = 5.0  #: seconds that a session that was ended may still work in this process
_CACHE_SIZE = 10_000
_TOUCH_S = 60.0
_TOUCH_WAIT_S = 0.2
_KEPT_S = 30 * 24 * 3600.0  #: of sessions that have ended
_columns = sessions.c

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Confirmed:
    """What the provider said about a person: `groups` are those that the setting names; `refresh_token` is encrypted."""

    person_id: str
    groups: Sequence[str]
    refresh_token: str | None


@dataclass(frozen=True)
class DueSession:
    """A session whose groups are to be confirmed by this process. `issuer`, `subject`: whose it is."""

    id: str
    issuer: str
    subject: str
    tenant_id: str
    refresh_token: str


class SessionBook:
    """Safe to share between threads. A valid session is cached for a few seconds."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._rules = GroupRules(settings.oidc_groups)
        self._idle_s = settings.session_idle_s
        self._life_s = settings.session_s
        self._recheck_s = settings.oidc_recheck_s
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Principal, float]] = {}

    def begin(self, confirmed: Confirmed, tenant_id: str, *, state: str, replaces: str | None) -> str:
        """Make a session and return its cookie, which is always a new one. `replaces`: the browser's cookie so far, whose session ends.

        Raises NightpressError(conflict) if a session was made by this sign-in before.
        """
        cookie = secrets.token_urlsafe(32)
        row = {
            "id": new_id("ses"),
            "person_id": confirmed.person_id,
            "tenant_id": tenant_id,
            "groups": list(confirmed.groups),
            "digest": digest_of(cookie),
            "state_digest": digest_of(state),
            "refresh_token": confirmed.refresh_token,
        }
        times = {name: db_now() for name in ("created_at", "seen_at", "confirmed_at")}
        times |= {"check_at": db_now(self._recheck_s), "ends_at": db_now(self._life_s)}
        try:
            with transaction(self._engine) as connection:
                connection.execute(insert(sessions).values(**row, **times))
                if replaces is not None:
                    old = (_columns.digest == digest_of(replaces), _columns.ended_at.is_(None))
                    connection.execute(_ended("signed_out").where(*old))
        except IntegrityError as error:
            raise NightpressError(
                ErrorCode.CONFLICT, "This sign-in was finished before.", hint="Begin again with the page's button."
            ) from error
        return cookie

    def cached(self, cookie: str) -> Principal | None:
        """The session's principal if it was read within the last seconds, without SQL; else None."""
        found = self._known.get(digest_of(cookie))
        return found[0] if found is not None and time.monotonic() < found[1] else None

    def authenticate(self, cookie: str) -> Principal:
        """The principal of a session. Raises NightpressError(unauthenticated) for a session that is unknown or has ended."""
        digest = digest_of(cookie)
        query = select(sessions, people.c.name, people.c.email, _columns.seen_at < db_now(-_TOUCH_S))
        query = query.join_from(sessions, people).where(_columns.digest == digest, *self._lives())
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        allowed = self._rules.scopes_by_tenant(row.groups) if row is not None else {}
        if row is None or row.tenant_id not in allowed:
            raise NightpressError(ErrorCode.UNAUTHENTICATED, "Your session has ended.", hint="Sign in again.")
        if row[-1]:
            self._touch(digest)
        person = Person(row.person_id, row.name, row.email, tuple(allowed))
        principal = Principal(row.tenant_id, row.person_id, allowed[row.tenant_id], row.person_id, person)
        with self._lock:
            if len(self._known) >= _CACHE_SIZE:
                self._known.clear()
            self._known[digest] = (principal, time.monotonic() + _CACHE_S)
        return principal

    def _touch(self, digest: str) -> None:
        """Write when a session was used. A failure is only logged: requests that read must work while the database takes no writes."""
        try:
            with transaction(self._engine, lock_wait_s=_TOUCH_WAIT_S) as connection:
                connection.execute(update(sessions).where(_columns.digest == digest).values(seen_at=db_now()))
        except NightpressError as error:
            log.warning("the use of a session was not noted: %s", error)

    def end(self, cookie: str) -> None:
        """Sign out. Safe to repeat."""
        digest = digest_of(cookie)
        with self._lock:
            self._known.pop(digest, None)
        with statement(self._engine) as connection:
            connection.execute(_ended("signed_out").where(_columns.digest == digest, _columns.ended_at.is_(None)))

    def page(self, tenant_id: str, *, cursor: str | None, limit: int) -> tuple[list[SessionView], str | None]:
        """One page of a tenant's sessions, newest first, and the cursor of the next."""
        live = case((and_(*self._lives()), True), else_=False).label("live")
        shown = select(sessions, people.c.name, people.c.email, live).join_from(sessions, people)
        rows, following = newest_first(
            self._engine,
            shown.where(_columns.tenant_id == tenant_id),
            _columns.created_at,
            _columns.id,
            cursor=cursor,
            limit=limit,
        )
        return [
            SessionView(**{name: getattr(row, name) for name in SessionView.model_fields}) for row in rows
        ], following

    def revoke(self, tenant_id: str, session_id: str) -> None:
        """End a tenant's session. Other processes notice within five seconds. Safe to repeat. Raises not_found."""
        this = (_columns.id == session_id, _columns.tenant_id == tenant_id)
        with transaction(self._engine) as connection:
            if connection.execute(select(_columns.id).where(*this)).one_or_none() is None:
                raise NightpressError(
                    ErrorCode.NOT_FOUND, "There is no such session.", hint="GET /v1/sessions lists yours."
                )
            connection.execute(_ended("revoked").where(*this, _columns.ended_at.is_(None)))

    # The control process -----------------------------------------------------------------------------------------

    def take_due(self) -> DueSession | None:
        """Take a session whose groups are to be confirmed; no other process takes it within the next minute."""
        due = (_columns.check_at <= db_now(), _columns.refresh_token.is_not(None), *self._lives())
        query = select(sessions, people.c.issuer, people.c.subject).join_from(sessions, people)
        query = query.where(*due).order_by(_columns.check_at).limit(1)
        with transaction(self._engine) as connection:
            row = connection.execute(query).one_or_none()
            if row is None:
                return None
            mine = (_columns.id == row.id, _columns.check_at == row.check_at, _columns.ended_at.is_(None))
            won = connection.execute(update(sessions).where(*mine).values(check_at=db_now(_RETRY_S))).rowcount
        if not won:
            return self.take_due()
        return DueSession(row.id, row.issuer, row.subject, row.tenant_id, row.refresh_token)

    def confirm(self, due: DueSession, groups: Sequence[str], refresh_token: str) -> None:
        """Write what the provider has confirmed."""
        values = {"groups": list(groups), "refresh_token": refresh_token}
        mine = (_columns.id == due.id, _columns.ended_at.is_(None))
        with statement(self._engine) as connection:
            connection.execute(
                update(sessions).where(*mine).values(confirmed_at=db_now(), check_at=db_now(self._recheck_s), **values)
            )

    def give_up(self, due: DueSession, reason: str) -> None:
        """End a session that the provider no longer confirms. `reason`: no_group or refused."""
        with statement(self._engine) as connection:
            connection.execute(_ended(reason).where(_columns.id == due.id, _columns.ended_at.is_(None)))

    def prune(self) -> None:
        """Mark sessions whose time is over as ended, and delete those that ended a month ago."""
        over = or_(*(~condition for condition in self._lives()[1:]))
        with statement(self._engine) as connection:
            connection.execute(_ended("expired").where(_columns.ended_at.is_(None), over))
        with statement(self._engine) as connection:
            connection.execute(delete(sessions).where(_columns.ended_at < db_now(-_KEPT_S)))

    def _lives(self) -> tuple[ColumnElement[bool], ...]:
        return (
            _columns.ended_at.is_(None),
            _columns.ends_at > db_now(),
            _columns.seen_at > db_now(-self._idle_s),
            _columns.confirmed_at > db_now(-(self._recheck_s + UNCONFIRMED_S)),
        )


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _ended(reason: str) -> Update:
    return update(sessions).values(ended_at=db_now(), reason=reason, refresh_token=None)
