"""The credentials that tenants store for their destinations. They can be written and replaced, but not read back."""

import logging
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, delete, func, insert, select, update

from nightpress.core.database import db_now, lock_until_commit, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.paging import newest_first
from nightpress.core.service.deliveries.addresses import Address, longest_prefix, prefix_parts
from nightpress.core.service.tables.deliveries import destination_credentials
from nightpress.core.service.vault import Vault
from nightpress.core.versions import changed_since
from nightpress.core.wire.deliveries import CredentialCreate, CredentialView, Secrets, check_secrets

log = logging.getLogger(__name__)
_MAX_CREDENTIALS = 100  #: per tenant
_BATCH = 100
_columns = destination_credentials.c


class CredentialStore:
    """Credentials of all tenants. A method that takes a tenant sees only that tenant's."""

    def __init__(self, engine: Engine, vault: Vault) -> None:
        self._engine = engine
        self._vault = vault

    def create(self, tenant_id: str, wanted: CredentialCreate, *, key_id: str | None = None) -> CredentialView:
        """Store credentials for the addresses below a prefix. Raises invalid_request, conflict (the prefix has some), quota_exceeded."""
        prefix = wanted.prefix.rstrip("/")
        prefix_parts(prefix)
        credential_id = new_id("crd")
        sealed = self._vault.seal(_owner(tenant_id, prefix), wanted.secrets.plain())
        mine = _columns.tenant_id == tenant_id
        with transaction(self._engine) as connection:
            lock_until_commit(connection, f"credentials/{tenant_id}")
            if connection.execute(select(_columns.id).where(mine, _columns.prefix == prefix)).one_or_none():
                raise NightpressError(
                    ErrorCode.CONFLICT,
                    f"There are credentials for {prefix} already.",
                    hint="Replace their secrets: `nightpress credentials rotate`.",
                )
            if connection.execute(select(func.count()).where(mine)).scalar_one() >= _MAX_CREDENTIALS:
                raise NightpressError(
                    ErrorCode.QUOTA_EXCEEDED,
                    f"There are already credentials for {_MAX_CREDENTIALS} prefixes.",
                    hint="Delete some first.",
                )
            row = {"id": credential_id, "tenant_id": tenant_id, "prefix": prefix, "version": 1, "created_by": key_id}
            times = {"created_at": db_now(), "rotated_at": db_now()}
            sealing = {"sealed": sealed, "sealed_by": self._vault.key_id}
            connection.execute(insert(destination_credentials).values(**row, **times, **sealing))
        return self.get(tenant_id, credential_id)

    def get(self, tenant_id: str, credential_id: str) -> CredentialView:
        return CredentialView(**self._row(tenant_id, credential_id)._mapping)

    def page(self, tenant_id: str, *, cursor: str | None, limit: int) -> tuple[list[CredentialView], str | None]:
        query = select(destination_credentials).where(_columns.tenant_id == tenant_id)
        rows, following = newest_first(
            self._engine, query, _columns.created_at, _columns.id, cursor=cursor, limit=limit
        )
        return [CredentialView(**row._mapping) for row in rows], following

    def rotate(self, tenant_id: str, credential_id: str, secrets: Secrets) -> CredentialView:
        """Replace the secrets. Deliveries use the new ones from their next attempt on. Raises not_found, invalid_request."""
        row = self._row(tenant_id, credential_id)
        try:
            check_secrets(row.prefix, secrets)
        except ValueError as error:
            raise NightpressError(ErrorCode.INVALID_REQUEST, f"{error}.", hint="Give exactly these.") from error
        sealed = self._vault.seal(_owner(tenant_id, row.prefix), secrets.plain())
        new = {"sealed": sealed, "sealed_by": self._vault.key_id, "version": _columns.version + 1}
        with transaction(self._engine) as connection:
            changed = update(destination_credentials).where(*_of_tenant(tenant_id, credential_id))
            connection.execute(changed.values(**new, rotated_at=db_now()))
        return self.get(tenant_id, credential_id)

    def delete(self, tenant_id: str, credential_id: str, *, version: int | None = None) -> None:
        """Raises not_found, precondition_failed."""
        with transaction(self._engine) as connection:
            gone = delete(destination_credentials).where(*_of_tenant(tenant_id, credential_id, version))
            won = connection.execute(gone).rowcount
        if not won:
            self._row(tenant_id, credential_id)
            raise changed_since()

    # For the control process -------------------------------------------------------------------------------------

    def secrets_for(self, tenant_id: str, address: Address) -> dict[str, str]:
        """The secrets of the longest prefix that holds an address. Raises destination_refused if the tenant stored none, or none can be read."""
        query = select(_columns.id, _columns.prefix, _columns.sealed).where(_columns.tenant_id == tenant_id)
        with transaction(self._engine, read_only=True) as connection:
            rows = {row.prefix: row for row in connection.execute(query)}
        prefix = longest_prefix(list(rows), address)
        if prefix is None:
            scheme, place = address.parts[:2]
            raise NightpressError(
                ErrorCode.DESTINATION_REFUSED,
                f"No credentials are stored for {scheme}://{place}.",
                hint=f"`nightpress credentials add {scheme}://{place}`, then `nightpress deliveries retry`.",
            )
        return self._vault.open(_owner(tenant_id, prefix), rows[prefix].sealed)

    def seal_again(self) -> int:
        """Encrypt credentials by the newest key that an older key has encrypted, some at a time. Returns their number."""
        old = select(destination_credentials).where(_columns.sealed_by != self._vault.key_id).limit(_BATCH)
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(old).all()
        count = 0
        for row in rows:
            owner = _owner(row.tenant_id, row.prefix)
            try:
                sealed = self._vault.seal(owner, self._vault.open(owner, row.sealed))
            except NightpressError as error:
                log.warning("Credentials %s: %s", row.id, error)
                continue
            still = (_columns.id == row.id, _columns.version == row.version, _columns.sealed_by == row.sealed_by)
            with transaction(self._engine) as connection:
                again = update(destination_credentials).where(*still)
                count += connection.execute(again.values(sealed=sealed, sealed_by=self._vault.key_id)).rowcount
        return count

    def _row(self, tenant_id: str, credential_id: str) -> Row[Any]:
        with transaction(self._engine, read_only=True) as connection:
            query = select(destination_credentials).where(*_of_tenant(tenant_id, credential_id))
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NightpressError(
                ErrorCode.NOT_FOUND, "There are no such credentials.", hint="GET /v1/credentials lists yours."
            )
        return row


def _of_tenant(tenant_id: str, credential_id: str, version: int | None = None) -> list[ColumnElement[bool]]:
    mine = [_columns.tenant_id == tenant_id, _columns.id == credential_id]
    return mine if version is None else [*mine, _columns.version == version]


def _owner(tenant_id: str, prefix: str) -> str:
    """What secrets are sealed for: nobody who can only write rows can have them sent to another place."""
    return f"{tenant_id} {prefix}"
