"""Adds deliveries to the tenant's webhooks, in the same transaction as what they tell."""

from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection

from nightpress.core.database import db_now, read_now
from nightpress.core.ids import new_id
from nightpress.core.service.tables.webhooks import webhook_deliveries, webhooks

#: the kind of event in a job's history → the type of a webhook's event
EVENTS = {"succeeded": "job.succeeded", "failed": "job.failed", "cancelled": "job.cancelled"}


def note_for_webhooks(connection: Connection, tenant_id: str, kind: str, told: dict[str, Any]) -> None:
    """Add a delivery for each webhook that is subscribed to this kind of event. `told`: the job's fields for the payload."""
    event = EVENTS.get(kind)
    if event is not None:
        note_event(connection, tenant_id, event, told)


def note_event(connection: Connection, tenant_id: str, event: str, told: dict[str, Any]) -> None:
    """Add a delivery for each webhook of the tenant that is subscribed to the event. `told`: the payload's data."""
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
