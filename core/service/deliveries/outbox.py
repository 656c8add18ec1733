"""Adds deliveries of a job's artifacts, in the transaction that accepts or promotes them."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection

from nightpress.core.database import db_now
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.service.deliveries.addresses import fill
from nightpress.core.service.tables.deliveries import IS_PENDING, deliveries, model_destinations
from nightpress.core.service.tables.jobs import job_artifacts


def deliver_latest(
    connection: Connection, tenant_id: str, model_name: str, job_id: str, *, key_id: str | None
) -> list[str]:
    """Deliver the result that a model's name means from now on to the destinations of the name. Returns the deliveries' ids."""
    standing = select(model_destinations.c.destinations).where(
        model_destinations.c.tenant_id == tenant_id, model_destinations.c.model_name == model_name
    )
    destinations = connection.execute(standing).scalar_one_or_none()
    return add_deliveries(connection, tenant_id, model_name, job_id, destinations or (), key_id=key_id)


def add_deliveries(
    connection: Connection,
    tenant_id: str,
    model_name: str,
    job_id: str,
    destinations: Sequence[str],
    *,
    key_id: str | None,
) -> list[str]:
    """Deliver every artifact of an accepted job to every destination. Returns the deliveries' ids.

    An artifact that is already on its way to an address is not added again. Where two artifacts have the same address, their deliveries
    are written as failed.
    """
    if not destinations:
        return []
    found = select(job_artifacts.c.format).where(job_artifacts.c.job_id == job_id).order_by(job_artifacts.c.format)
    formats = connection.scalars(found).all()
    there = select(deliveries.c.artifact, deliveries.c.destination).where(deliveries.c.job_id == job_id, IS_PENDING)
    present = {(row.artifact, row.destination) for row in connection.execute(there)}
    wanted = []
    for template in dict.fromkeys(destinations):
        filled = {form: fill(template, model=model_name, job=job_id, artifact=form) for form in formats}
        clash = None if len(set(filled.values())) == len(filled) else _same_address(template, formats)
        wanted += [(form, url, clash) for form, url in filled.items() if (form, url) not in present]
    ids = []
    for form, url, clash in wanted:
        ids.append(new_id("dlv"))
        row: dict[str, Any] = {
            "id": ids[-1],
            "tenant_id": tenant_id,
            "job_id": job_id,
            "artifact": form,
            "destination": url,
            "state": "pending" if clash is None else "failed",
            "error": clash,
            "created_by": key_id,
        }
        times = {"created_at": db_now(), "next_at": db_now() if clash is None else None}
        times["finished_at"] = None if clash is None else db_now()
        empty = {"attempts": 0, "total_bytes": 0, "sent_bytes": 0, "resume": {}}
        connection.execute(insert(deliveries).values(**row, **times, **empty))
    return ids


def _same_address(template: str, formats: Sequence[str]) -> dict[str, Any]:
    return NightpressError(
        ErrorCode.INVALID_REQUEST,
        f"{', '.join(formats)} would all go to {template[:200]}.",
        hint="Write {artifact} in the destination, and deliver again: `nightpress deliveries add`.",
    ).as_dict()
