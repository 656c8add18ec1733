"""What happened to a job, noted for its tenant's webhooks in the transaction in which it happened."""

from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection

from nightpress.core.database import db_now, read_now
from nightpress.core.ids import new_id
from nightpress.core.service.tables.webhooks import webhook_deliveries, webhooks

#: the event in a job's history → what a webhook calls it
EVENTS = {"succeeded": "job.succeeded", "failed": "job.failed", "cancelled": "job.cancelled"}


def note_for_webhooks(connection: Connection, tenant_id: str, kind: str, told: dict[str, Any]) -> None:
    """Add a delivery for each webhook that listens for events of this kind. `told`: what its receiver reads of the job."""
    event = EVENTS.get(kind)
    if event is None:
        return
    mine = select(webhooks.c.id, webhooks.c.events).where(webhooks.c.tenant_id == tenant_id, webhooks.c.enabled)
    listening = [row.id for row in connection.execute(mine) if event in row.events]
    if not listening:
        return
    payload = {"type": event, "timestamp": read_now(connection).isoformat(), "data": told}
    for webhook_id in listening:
        add_delivery(connection, webhook_id, event, payload)


def add_delivery(connection: Connection, webhook_id: str, event: str, payload: dict[str, Any]) -> str:
    delivery_id = new_id("msg")
    row = {"id": delivery_id, "webhook_id": webhook_id, "event": event, "payload": payload, "attempts": 0}
    connection.execute(insert(webhook_deliveries).values(**row, state="pending", next_at=db_now(), created_at=db_now()))
    return delivery_id
