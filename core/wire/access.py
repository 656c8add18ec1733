"""Tenants, quotas, keys and the audit log on the wire."""

import datetime as dt
from typing import Annotated

from pydantic import (
    Field,
    model_validator,
)

from nightpress.core.wire.base import ONE_LINE, Moment, Request, View

Bound = Annotated[int | None, Field(ge=0, le=2**53)]
SmallBound = Annotated[int | None, Field(ge=0, le=2**31 - 1)]
TenantId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class QuotaChange(Request):
    """A tenant's own bounds. null: the installation's setting; 0: none."""

    max_queued_jobs: SmallBound = None
    max_running_jobs: SmallBound = None
    max_storage_bytes: Bound = None
    max_gpu_seconds_month: Bound = None
    rate_limit_per_minute: SmallBound = None
    max_cost_day: Bound = Field(None, description="In the operator's currency.")
    max_cost_month: Bound = None


class UsageView(View):
    queued_jobs: int
    running_jobs: int
    storage_bytes: int
    running_gpus: int = 0  #: GPUs that the running jobs hold
    gpu_seconds_month: (
        float  #: of attempts that have ended, this calendar month in UTC; an attempt on n GPUs counts n times
    )
    cost_day: float = 0.0  #: today in UTC, in the operator's currency, attempts that run included
    cost_month: float = 0.0
    currency: str = ""  #: empty where the operator has set no prices


class TenantView(View):
    """`own`: what was set for it; `quotas`: what holds; `version` is also the ETag."""

    id: str
    own: QuotaChange
    quotas: dict[str, int]
    usage: UsageView
    version: int


class KeyCreate(Request):
    """`tenant_id` is for administrators; others make keys of their own tenant, with scopes that their own key has."""

    name: str = Field(min_length=1, max_length=200, pattern=ONE_LINE)
    scopes: list[Annotated[str, Field(max_length=32)]] = Field(min_length=1, max_length=20)
    expires_at: Moment | None = None
    expires_in_s: float | None = Field(
        None,
        gt=0,
        le=100 * 365 * 24 * 3600.0,
        description="Instead of `expires_at`: seconds from now, by the service's clock.",
    )
    tenant_id: TenantId | None = None

    @model_validator(mode="after")
    def _one_end(self) -> "KeyCreate":
        if self.expires_at is not None and self.expires_in_s is not None:
            raise ValueError("a key expires at a time or after a time, not both: give `expires_at` or `expires_in_s`")
        return self


class KeyRotate(Request):
    """How long the old key works beside the new one."""

    overlap_s: float = Field(3600.0, ge=0, le=30 * 24 * 3600.0)


class KeyView(View):
    """A key without its secret."""

    id: str
    tenant_id: str
    name: str
    scopes: list[str]
    created_at: dt.datetime
    expires_at: dt.datetime | None
    expired: bool = False  #: by the database's clock
    revoked_at: dt.datetime | None
    last_used_at: dt.datetime | None
    rotated_from: str | None
    made_by: str | None = Field(
        description="The key that made it: when that key ends, this one ends too. Or the person who made it, whose sessions it outlasts."
    )


class NewKeyView(View):
    """`key` is shown only here."""

    record: KeyView
    key: str


class PersonView(View):
    """Somebody who has signed in by OIDC. `tenants`: all in which the person's groups allow something."""

    id: str
    name: str
    email: str
    tenants: list[str]


class SessionView(View):
    """A session of the page. `person_id` stands in the audit log where a key's id stands."""

    id: str
    person_id: str
    name: str
    email: str
    tenant_id: str
    groups: list[str]
    live: bool
    created_at: dt.datetime
    seen_at: dt.datetime  #: to the minute
    confirmed_at: dt.datetime  #: when the provider last confirmed the groups
    ends_at: dt.datetime
    ended_at: dt.datetime | None
    reason: str | None = Field(description="signed_out, revoked, expired, no_group or refused (by the provider).")


class ProviderView(View):
    """How to sign in. Without a provider only keys are taken, and everything else is empty."""

    name: str = Field("", description="What the page calls the provider.")
    issuer: str = ""
    client_id: str = Field("", description="The command line's client.")
    scopes: list[str] = []


class AuditView(View):
    """A line of the audit log: who made a request that may have changed something."""

    id: str
    at: dt.datetime
    tenant_id: str
    key_id: str
    action: str
    subject: str
    status: int
    request_id: str
