"""Webhooks, their deliveries and every attempt, in SQL."""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, delete, func, insert, select, update
from sqlalchemy.engine import Connection

from nightpress.core.database import clean_text, db_now, read_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.paging import newest_first
from nightpress.core.service.notifications.mail import check_recipient
from nightpress.core.service.tables.webhooks import webhook_attempts, webhook_deliveries, webhooks
from nightpress.core.service.webhooks.outbox import add_delivery
from nightpress.core.service.webhooks.signing import SecretKeeper
from nightpress.core.service.webhooks.targets import check_target
from nightpress.core.settings import Settings
from nightpress.core.versions import changed_since
from nightpress.core.wire.webhooks import (
    AttemptView,
    DeliveryView,
    NewWebhookView,
    WebhookCreate,
    WebhookKind,
    WebhookUpdate,
    WebhookView,
)

_MAX_WEBHOOKS = 50  #: per tenant
_CLAIM_S = 60.0  #: seconds after which a delivery is sent again if the process that took it did not settle it
_deliveries = webhook_deliveries.c


@dataclass(frozen=True)
class DueDelivery:
    """A delivery that this process has taken. No other process sends it at the same time."""

    id: str
    webhook_id: str
    url: str = field(repr=False)  #: may hold a token; never in a log
    payload: dict[str, Any] = field(repr=False)
    attempts: int  #: including this attempt
    kind: WebhookKind
    template: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


class WebhookStore:
    """Webhooks of all tenants. A method that takes a tenant sees only that tenant's webhooks. Safe to share between threads."""

    def __init__(self, engine: Engine, keeper: SecretKeeper, settings: Settings) -> None:
        self._engine = engine
        self._keeper = keeper
        self._settings = settings

    # For users ---------------------------------------------------------------------------------------------------

    def create(self, tenant_id: str, wanted: WebhookCreate, *, key_id: str | None = None) -> NewWebhookView:
        """Register a webhook. Raises url_not_allowed, quota_exceeded."""
        self._check(wanted.kind, wanted.url)
        webhook_id = new_id("whk")
        mine = select(func.count()).select_from(webhooks).where(webhooks.c.tenant_id == tenant_id)
        with transaction(self._engine) as connection:
            if connection.execute(mine).scalar_one() >= _MAX_WEBHOOKS:
                raise NightpressError(
                    ErrorCode.QUOTA_EXCEEDED, f"There are already {_MAX_WEBHOOKS} webhooks.", hint="Delete one first."
                )
            new = {"id": webhook_id, "tenant_id": tenant_id, "generation": 1, "enabled": True, "version": 1}
            row = {**new, **wanted.model_dump(), "events": sorted(wanted.events), "created_by": key_id}
            connection.execute(insert(webhooks).values(created_at=db_now(), **row))
        secret = self._keeper.secret(webhook_id, 1) if wanted.kind == "standard" else None
        return NewWebhookView(webhook=self.get(tenant_id, webhook_id), secret=secret)

    def get(self, tenant_id: str, webhook_id: str) -> WebhookView:
        return _view(self._row(tenant_id, webhook_id))

    def page(self, tenant_id: str, *, cursor: str | None, limit: int) -> tuple[list[WebhookView], str | None]:
        mine = select(webhooks).where(webhooks.c.tenant_id == tenant_id)
        rows, following = newest_first(
            self._engine, mine, webhooks.c.created_at, webhooks.c.id, cursor=cursor, limit=limit
        )
        return [_view(row) for row in rows], following

    def edit(
        self, tenant_id: str, webhook_id: str, wanted: WebhookUpdate, *, version: int | None = None
    ) -> WebhookView:
        """Change the given fields. Raises url_not_allowed, invalid_request, precondition_failed."""
        kind = self._row(tenant_id, webhook_id).kind
        if wanted.url is not None:
            self._check(kind, wanted.url)
        if wanted.template and kind == "standard":
            raise NightpressError(
                ErrorCode.INVALID_REQUEST, "A standard webhook's messages are JSON, without a template."
            )
        values = wanted.model_dump(exclude_none=True)
        if wanted.enabled:
            values["disabled_reason"] = None
        unchanged = _of_tenant(tenant_id, webhook_id, version)
        with transaction(self._engine) as connection:
            changed = update(webhooks).where(*unchanged).values(version=webhooks.c.version + 1, **values)
            won = connection.execute(changed).rowcount
        view = self.get(tenant_id, webhook_id)
        if not won:
            raise changed_since()
        return view

    def rotate(self, tenant_id: str, webhook_id: str, *, overlap_s: float) -> NewWebhookView:
        """Make a new secret. Raises conflict if the webhook's messages are not signed. For `overlap_s` seconds, messages carry the signatures of both secrets, so that the receiver can switch."""
        if self._row(tenant_id, webhook_id).kind != "standard":
            raise NightpressError(ErrorCode.CONFLICT, "This webhook has no secret: only standard messages are signed.")
        with transaction(self._engine) as connection:
            turned = update(webhooks).where(*_of_tenant(tenant_id, webhook_id))
            new = {"generation": webhooks.c.generation + 1, "version": webhooks.c.version + 1}
            connection.execute(turned.values(**new, previous_until=db_now(overlap_s)))
        row = self._row(tenant_id, webhook_id)
        return NewWebhookView(webhook=_view(row), secret=self._keeper.secret(webhook_id, row.generation))

    def delete(self, tenant_id: str, webhook_id: str, *, version: int | None = None) -> None:
        """Delete a webhook and its deliveries, including pending ones. Raises not_found, precondition_failed."""
        with transaction(self._engine) as connection:
            won = connection.execute(delete(webhooks).where(*_of_tenant(tenant_id, webhook_id, version))).rowcount
        if not won:
            self._row(tenant_id, webhook_id)
            raise changed_since()

    def test(self, tenant_id: str, webhook_id: str) -> DeliveryView:
        """Add a delivery with an empty message, to test the connection."""
        self._row(tenant_id, webhook_id)
        with transaction(self._engine) as connection:
            payload = {"type": "webhook.test", "timestamp": read_now(connection).isoformat(), "data": {}}
            delivery_id = add_delivery(connection, webhook_id, "webhook.test", payload)
        return self.delivery(tenant_id, webhook_id, delivery_id)

    def deliveries(
        self, tenant_id: str, webhook_id: str, *, cursor: str | None, limit: int
    ) -> tuple[list[DeliveryView], str | None]:
        self._row(tenant_id, webhook_id)
        query = select(webhook_deliveries).where(_deliveries.webhook_id == webhook_id)
        rows, following = newest_first(
            self._engine, query, _deliveries.created_at, _deliveries.id, cursor=cursor, limit=limit
        )
        return [DeliveryView(**row._mapping) for row in rows], following

    def delivery(self, tenant_id: str, webhook_id: str, delivery_id: str) -> DeliveryView:
        """A delivery with all its attempts. Raises not_found."""
        self._row(tenant_id, webhook_id)
        delivery = select(webhook_deliveries).where(_deliveries.id == delivery_id, _deliveries.webhook_id == webhook_id)
        tries = select(webhook_attempts).where(webhook_attempts.c.delivery_id == delivery_id)
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(delivery).one_or_none()
            if row is None:
                raise _missing("delivery")
            log = [
                AttemptView(**attempt._mapping)
                for attempt in connection.execute(tries.order_by(webhook_attempts.c.number))
            ]
        return DeliveryView(**row._mapping, log=log)

    def redeliver(self, tenant_id: str, webhook_id: str, delivery_id: str) -> DeliveryView:
        """Send a delivery again now, with the same webhook-id, whatever its state."""
        self.delivery(tenant_id, webhook_id, delivery_id)
        again = update(webhook_deliveries).where(_deliveries.id == delivery_id)
        with transaction(self._engine) as connection:
            connection.execute(again.values(state="pending", next_at=db_now()))
        return self.delivery(tenant_id, webhook_id, delivery_id)

    # For the control process -------------------------------------------------------------------------------------

    def now(self) -> dt.datetime:
        with transaction(self._engine, read_only=True) as connection:
            return read_now(connection)

    def take_due(self, now: dt.datetime, *, limit: int = 20) -> list[DueDelivery]:
        """Take the deliveries that are due. Taking a delivery moves its next attempt by `_CLAIM_S`, so that only one process gets it."""
        query = (
            select(_deliveries.id, _deliveries.attempts, _deliveries.next_at, _deliveries.payload, webhooks)
            .join_from(webhook_deliveries, webhooks, webhooks.c.id == _deliveries.webhook_id)
            .where(_deliveries.state == "pending", _deliveries.next_at <= now, webhooks.c.enabled)
            .order_by(_deliveries.next_at)
            .limit(limit)
        )
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query).all()
        taken = []
        for row in rows:
            delivery_id, attempts, next_at = row[0], row[1], row[2]
            still = (
                _deliveries.id == delivery_id,
                _deliveries.attempts == attempts,
                _deliveries.next_at == next_at,
                _deliveries.state == "pending",
            )
            later = now + dt.timedelta(seconds=_CLAIM_S)
            with transaction(self._engine) as connection:
                mine = update(webhook_deliveries).where(*still).values(attempts=attempts + 1, next_at=later)
                if not connection.execute(mine).rowcount:
                    continue
            webhook = row._mapping
            hook_id, generation = str(webhook[webhooks.c.id]), int(webhook[webhooks.c.generation])
            until = webhook[webhooks.c.previous_until]
            generations = [generation] + [generation - 1] * (until is not None and until > now)
            secrets = tuple(self._keeper.secret(hook_id, generation) for generation in generations)
            how = (webhook[webhooks.c.kind], webhook[webhooks.c.template])
            taken.append(
                DueDelivery(delivery_id, hook_id, webhook[webhooks.c.url], row[3], attempts + 1, *how, secrets)
            )
        return taken

    def settle(
        self,
        due: DueDelivery,
        *,
        state: str,
        next_at: dt.datetime | None,
        attempt: Mapping[str, Any],
        gone: bool = False,
    ) -> None:
        """Store an attempt, and the new state of its delivery. `gone`: the receiver answered 410, so the webhook is disabled."""
        with transaction(self._engine) as connection:
            still = (_deliveries.id == due.id, _deliveries.attempts == due.attempts)
            changed = update(webhook_deliveries).where(*still).values(state=state, next_at=next_at)
            if not connection.execute(changed).rowcount:
                return  # deleted since, or taken by another process after this attempt took too long
            error = attempt.get("error")
            values = {**attempt, "error": clean_text(error)[:500] if error else None}
            connection.execute(
                insert(webhook_attempts).values(delivery_id=due.id, number=due.attempts, at=db_now(), **values)
            )
            if gone:
                self._disable(connection, due.webhook_id)

    def _disable(self, connection: Connection, webhook_id: str) -> None:
        why = "The receiver answered 410 Gone."
        off = update(webhooks).where(webhooks.c.id == webhook_id)
        connection.execute(off.values(enabled=False, disabled_reason=why, version=webhooks.c.version + 1))

    def forget_deliveries(self, older_than_s: float) -> int:
        """Delete settled deliveries that are older than `older_than_s` seconds. Returns their number."""
        old = (_deliveries.state != "pending", _deliveries.created_at < db_now(-older_than_s))
        with transaction(self._engine) as connection:
            return connection.execute(delete(webhook_deliveries).where(*old)).rowcount

    def _check(self, kind: str, url: str) -> None:
        """Raises url_not_allowed."""
        if kind == "email":
            check_recipient(url, self._settings)
        else:
            check_target(url, self._settings.webhook_networks)

    def _row(self, tenant_id: str, webhook_id: str) -> Row[Any]:
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(select(webhooks).where(*_of_tenant(tenant_id, webhook_id))).one_or_none()
        if row is None:
            raise _missing("webhook")
        return row


def _of_tenant(tenant_id: str, webhook_id: str, version: int | None = None) -> list[ColumnElement[bool]]:
    mine = [webhooks.c.tenant_id == tenant_id, webhooks.c.id == webhook_id]
    return mine if version is None else [*mine, webhooks.c.version == version]


def _view(row: Row[Any]) -> WebhookView:
    return WebhookView(**row._mapping)


def _missing(what: str) -> NightpressError:
    return NightpressError(ErrorCode.NOT_FOUND, f"There is no such {what}.", hint="GET /v1/webhooks lists yours.")
