"""Webhooks and their deliveries on the wire."""

import datetime as dt
from string import Template
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from nightpress.core.wire.base import Request, View

WebhookEvent = Literal[
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "study.succeeded",
    "study.failed",
    "study.cancelled",
    "schedule.failed",
    "schedule.skipped",
    "model.promoted",
]
_MOST_EVENTS = 9
WebhookKind = Literal["standard", "slack", "email"]
WebhookUrl = Annotated[
    str,
    Field(
        min_length=8,
        max_length=2048,
        pattern=r"^(https?://|mailto:)",
        description="An address of the web or, for the kind `email`, `mailto:` and a recipient.",
        examples=["https://ci.example.com/hooks"],
    ),
]
#: what a template may name, as `$name`
TEMPLATE_FIELDS = ("event", "id", "name", "model", "recipe", "state", "verdict", "reason", "error", "job", "link")


def _fields_are_known(text: str) -> str:
    template = Template(text)
    if not template.is_valid():
        raise ValueError("has a `$` without a field's name; write `$$` for the sign")
    unknown = sorted(set(template.get_identifiers()) - set(TEMPLATE_FIELDS))
    if unknown:
        raise ValueError(f"names ${unknown[0]}; there are: {', '.join('$' + name for name in TEMPLATE_FIELDS)}")
    return text


MessageTemplate = Annotated[
    str,
    Field(
        max_length=2000,
        description="The text of messages, in which `$name`, `$model` and so on are filled in. The first line is an e-mail's subject. Empty: the usual text.",
        examples=["$model is $verdict\n$link"],
    ),
    AfterValidator(_fields_are_known),
]


class WebhookCreate(Request):
    """An address and the events it hears of.

    `standard`: JSON, signed as standardwebhooks.com specifies. `slack`: a text, for incoming webhooks of Slack and of what is compatible with it. `email`: a mail.
    """

    url: WebhookUrl
    events: list[WebhookEvent] = Field(min_length=1, max_length=_MOST_EVENTS)
    kind: WebhookKind = "standard"
    template: MessageTemplate = ""

    @model_validator(mode="after")
    def _fits(self) -> "WebhookCreate":
        if (self.kind == "email") != self.url.startswith("mailto:"):
            raise ValueError("an address mailto: and the kind email belong together")
        if self.template and self.kind == "standard":
            raise ValueError("a template is for the kinds slack and email; a standard message is JSON")
        return self


class WebhookUpdate(Request):
    url: WebhookUrl | None = None
    events: list[WebhookEvent] | None = Field(None, min_length=1, max_length=_MOST_EVENTS)
    template: MessageTemplate | None = None
    enabled: bool | None = None


class SecretRotate(Request):
    """How long messages carry the old secret's signature beside the new one's."""

    overlap_s: float = Field(24 * 3600.0, ge=0, le=30 * 24 * 3600.0)


class WebhookView(View):
    id: str
    url: str
    kind: WebhookKind = "standard"
    events: list[WebhookEvent]
    template: str = ""
    enabled: bool
    disabled_reason: str | None
    version: int
    created_by: str | None
    created_at: dt.datetime


class NewWebhookView(View):
    """`secret` is shown only here. Only messages of the kind `standard` are signed."""

    webhook: WebhookView
    secret: str | None


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
