"""Lists, issues, rotates and revokes keys through the API. A key never gets more rights than the caller's key has."""

import datetime as dt
from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, and_, case, or_, select, update

from nightpress.core.database import db_now, read_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.paging import newest_first
from nightpress.core.service.access.keys import Principal, create_key
from nightpress.core.service.tables.access import api_keys
from nightpress.core.wire.access import KeyCreate, KeyView, NewKeyView

_columns = api_keys.c
_EXPIRED = and_(_columns.expires_at.is_not(None), _columns.expires_at <= db_now())
_SHOWN = [*(column for column in api_keys.c if column.name not in {"digest", "family"}), _EXPIRED.label("expired")]


class KeyIssuer:
    """Manages keys for a caller. A caller sees the keys of its own tenant; an administrator sees those of any tenant."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def page(
        self, caller: Principal, *, tenant_id: str | None, cursor: str | None, limit: int
    ) -> tuple[list[KeyView], str | None]:
        """One page of keys, newest first, and the cursor of the next."""
        mine = select(*_SHOWN).where(_columns.tenant_id == self._tenant(caller, tenant_id))
        rows, following = newest_first(self._engine, mine, _columns.created_at, _columns.id, cursor=cursor, limit=limit)
        return [_view(row) for row in rows], following

    def get(self, caller: Principal, key_id: str) -> KeyView:
        """Raises not_found."""
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(select(*_SHOWN).where(*self._visible(caller, key_id))).one_or_none()
        if row is None:
            raise NightpressError(ErrorCode.NOT_FOUND, "There is no such key.", hint="GET /v1/keys lists yours.")
        return _view(row)

    def create(self, caller: Principal, wanted: KeyCreate) -> NewKeyView:
        """Make a key. It expires with the caller's key at the latest, and shares the rate limit of the caller's key.

        A key that a person makes outlasts the person's session. A key that an administrator makes for another tenant is independent of the caller's, unless it has the scope admin.
        Raises invalid_request, and forbidden for scopes or an expiry that go beyond the caller's own.
        """
        tenant_id = self._tenant(caller, wanted.tenant_id)
        _must_hold(caller, wanted.scopes)
        expires_at = wanted.expires_at
        if wanted.expires_in_s is not None:
            expires_at = self._now() + dt.timedelta(seconds=wanted.expires_in_s)
        elif expires_at is not None and expires_at <= self._now():
            raise NightpressError(
                ErrorCode.INVALID_REQUEST, "The key would have expired already.", hint="Give a later `expires_at`."
            )
        own_line = tenant_id == caller.tenant_id or "admin" in wanted.scopes
        if own_line and caller.person is None:
            expires_at = _within(self.get(caller, caller.key_id).expires_at, expires_at)
        record, plain = create_key(
            self._engine,
            tenant_id=tenant_id,
            name=wanted.name,
            scopes=wanted.scopes,
            expires_at=expires_at,
            made_by=caller.key_id if own_line else None,
            family=caller.family if own_line else None,
        )
        return NewKeyView(record=self._read(record.id), key=plain)

    def rotate(self, caller: Principal, key_id: str, *, overlap_s: float) -> NewKeyView:
        """Replace a key by a new one with the same name, scopes and expiry. The old key works for `overlap_s` more seconds."""
        old = self.get(caller, key_id)
        _must_hold(caller, old.scopes)
        if old.revoked_at is not None or old.expired:
            raise NightpressError(
                ErrorCode.CONFLICT, "The key no longer works, so it can't be rotated.", hint="Make a new one."
            )
        record, plain = create_key(
            self._engine,
            tenant_id=old.tenant_id,
            name=old.name,
            scopes=old.scopes,
            expires_at=old.expires_at,
            rotated_from=old.id,
            made_by=old.made_by,
            family=self._family(old.id),
        )
        ends = db_now(overlap_s)
        sooner = case((or_(_columns.expires_at.is_(None), _columns.expires_at > ends), ends), else_=_columns.expires_at)
        with transaction(self._engine) as connection:
            connection.execute(update(api_keys).where(_columns.id == old.id).values(expires_at=sooner))
            connection.execute(update(api_keys).where(_columns.made_by == old.id).values(made_by=record.id))
        return NewKeyView(record=self._read(record.id), key=plain)

    def revoke(self, caller: Principal, key_id: str) -> None:
        """Revoke a key and all keys that were made with it. Safe to repeat. Other processes notice within five seconds."""
        key = self.get(caller, key_id)
        _must_hold(caller, key.scopes)
        line = select(_columns.id).where(_columns.id == key_id).cte("line", recursive=True)
        line = line.union(select(_columns.id).where(_columns.made_by == line.c.id))
        with transaction(self._engine) as connection:
            live = (_columns.id.in_(select(line.c.id)), _columns.revoked_at.is_(None))
            connection.execute(update(api_keys).where(*live).values(revoked_at=db_now()))

    def _family(self, key_id: str) -> str:
        with transaction(self._engine, read_only=True) as connection:
            family = connection.execute(select(_columns.family).where(_columns.id == key_id)).scalar_one()
        return family or key_id

    def _read(self, key_id: str) -> KeyView:
        with transaction(self._engine, read_only=True) as connection:
            return _view(connection.execute(select(*_SHOWN).where(_columns.id == key_id)).one())

    def _now(self) -> dt.datetime:
        with transaction(self._engine, read_only=True) as connection:
            return read_now(connection)

    def _tenant(self, caller: Principal, tenant_id: str | None) -> str:
        if tenant_id is None or tenant_id == caller.tenant_id:
            return caller.tenant_id
        if not caller.is_admin:
            raise NightpressError(
                ErrorCode.FORBIDDEN, "Only an administrator's key sees other tenants.", hint="Leave `tenant_id` out."
            )
        return tenant_id

    def _visible(self, caller: Principal, key_id: str) -> list[ColumnElement[bool]]:
        seen = [_columns.id == key_id]
        return seen if caller.is_admin else [*seen, _columns.tenant_id == caller.tenant_id]


def _within(own: dt.datetime | None, wanted: dt.datetime | None) -> dt.datetime | None:
    """The expiry of a key whose maker's key expires at `own`; None: never. Raises forbidden if `wanted` is later than `own`."""
    if own is None or (wanted is not None and wanted <= own):
        return wanted
    if wanted is not None:
        raise NightpressError(
            ErrorCode.FORBIDDEN,
            f"Your key itself ends at {own.isoformat()}.",
            hint="Give an `expires_at` that is no later, or leave it out.",
        )
    return own


def _must_hold(caller: Principal, scopes: Collection[str]) -> None:
    beyond = sorted(set(scopes) - caller.scopes)
    if beyond and not caller.is_admin:
        raise NightpressError(
            ErrorCode.FORBIDDEN,
            f"Your key itself has no {', '.join(beyond)[:300]}.",
            hint="A key gives, renews and takes away no more than it may itself.",
        )


def _view(row: Row[Any]) -> KeyView:
    return KeyView(**row._mapping)
