"""Webhooks and their deliveries on the wire."""

import datetime as dt
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
)

from nightpress.core.wire.base import Request, View

WebhookEvent = Literal["job.succeeded", "job.failed", "job.cancelled"]
WebhookUrl = Annotated[
    str, Field(min_length=8, max_length=2048, pattern=r"^https?://", examples=["https://ci.example.com/hooks"])
]


class WebhookCreate(Request):
    """An address and the events it hears of. Messages are signed as standardwebhooks.com specifies."""

    url: WebhookUrl
    events: list[WebhookEvent] = Field(min_length=1, max_length=3)


class WebhookUpdate(Request):
    url: WebhookUrl | None = None
    events: list[WebhookEvent] | None = Field(None, min_length=1, max_length=3)
    enabled: bool | None = None


class SecretRotate(Request):
    """How long messages carry the old secret's signature beside the new one's."""

    overlap_s: float = Field(24 * 3600.0, ge=0, le=30 * 24 * 3600.0)


class WebhookView(View):
    id: str
    url: str
    events: list[WebhookEvent]
    enabled: bool
    disabled_reason: str | None
    version: int
    created_by: str | None
    created_at: dt.datetime


class NewWebhookView(View):
    """`secret` is shown only here."""

    webhook: WebhookView
    secret: str


class AttemptView(View):
    """One try: the receiver's status, or why there was none."""

    number: int
    at: dt.datetime
    status: int | None
    error: str | None
    duration_ms: int


class DeliveryView(View):
    """A message. `id` is its webhook-id at every try; `log` is filled in where one delivery is asked for."""

    id: str
    webhook_id: str
    event: str
    payload: dict[str, Any]
    state: Literal["pending", "delivered", "failed"]
    attempts: int
    next_at: dt.datetime | None
    created_at: dt.datetime
    log: list[AttemptView] = []
