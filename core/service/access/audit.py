"""The audit log: who did what. Triggers in the database allow only two changes: adding lines and deleting old ones."""

from sqlalchemy import Engine, delete, insert, select

from nightpress.core.database import clean_text, db_now, statement
from nightpress.core.ids import new_id
from nightpress.core.paging import newest_first
from nightpress.core.service.tables.access import audit_log
from nightpress.core.wire.access import AuditView

LEAST_KEPT_S = 31 * 24 * 3600.0
_BATCH = 5000


class AuditLog:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def note(self, *, tenant_id: str, key_id: str, action: str, subject: str, status: int, request_id: str) -> None:
        """Add a line. `action`: method and route; `subject`: the path of the request, with its identifiers."""
        line = {
            "id": new_id("aud"),
            "tenant_id": tenant_id,
            "key_id": key_id,
            "action": action[:200],
            "subject": clean_text(subject)[:1024],
            "status": status,
            "request_id": request_id,
        }
        with statement(self._engine) as connection:
            connection.execute(insert(audit_log).values(at=db_now(), **line))

    def prune(self, older_than_s: float) -> int:
        """Delete lines that are older than `older_than_s` seconds and than LEAST_KEPT_S. Returns the number of deleted lines.

        A trigger in the database refuses to delete lines younger than 30 days.
        """
        old = audit_log.c.at < db_now(-max(older_than_s, LEAST_KEPT_S))
        few = select(audit_log.c.id).where(old).limit(_BATCH)
        with statement(self._engine) as connection:
            return connection.execute(delete(audit_log).where(audit_log.c.id.in_(few))).rowcount

    def page(self, *, tenant_id: str | None, cursor: str | None, limit: int) -> tuple[list[AuditView], str | None]:
        """One page of lines, newest first, and the cursor of the next. `tenant_id` None: of all tenants."""
        query = select(audit_log)
        if tenant_id is not None:
            query = query.where(audit_log.c.tenant_id == tenant_id)
        rows, following = newest_first(self._engine, query, audit_log.c.at, audit_log.c.id, cursor=cursor, limit=limit)
        return [AuditView(**row._mapping) for row in rows], following
