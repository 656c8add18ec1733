"""The calls about who may do what, and who is told: webhooks, keys, tenants with their quotas, and the audit log."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

from nightpress.client.calls import Call, given, if_match, nothing, path_of, post, reader
from nightpress.core.wire.access import AuditView, KeyCreate, KeyRotate, KeyView, NewKeyView, QuotaChange, TenantView
from nightpress.core.wire.base import Page
from nightpress.core.wire.system import MeView
from nightpress.core.wire.webhooks import (
    DeliveryView,
    NewWebhookView,
    SecretRotate,
    WebhookCreate,
    WebhookEvent,
    WebhookUpdate,
    WebhookView,
)

_WEBHOOK, _WEBHOOKS, _NEW_WEBHOOK = reader(WebhookView), reader(Page[WebhookView]), reader(NewWebhookView)
_DELIVERY, _DELIVERIES = reader(DeliveryView), reader(Page[DeliveryView])
_KEY, _KEYS, _NEW_KEY = reader(KeyView), reader(Page[KeyView]), reader(NewKeyView)
_TENANT, _TENANTS, _AUDIT = reader(TenantView), reader(Page[TenantView]), reader(Page[AuditView])
_ME = reader(MeView)

# Webhooks ------------------------------------------------------------------------------------------------------------


def create_webhook(url: str, events: Sequence[WebhookEvent]) -> Call[NewWebhookView]:
    """Its secret stands in this answer and nowhere else."""
    return post("/v1/webhooks", _NEW_WEBHOOK, WebhookCreate(url=url, events=list(events)))


def get_webhook(webhook: str) -> Call[WebhookView]:
    return Call("GET", path_of("webhooks", webhook), _WEBHOOK)


def page_webhooks(*, cursor: str | None = None, limit: int = 50) -> Call[Page[WebhookView]]:
    return Call("GET", "/v1/webhooks", _WEBHOOKS, params=given(cursor=cursor, limit=limit))


def edit_webhook(webhook: str, *, version: int | None = None, **changes: Any) -> Call[WebhookView]:
    """`changes`: those of core.wire.webhooks.WebhookUpdate. With `version`, only while it is still that one: else ApiError(precondition_failed)."""
    body = WebhookUpdate(**changes).model_dump(mode="json", exclude_unset=True)
    headers = if_match(version)
    return Call("PATCH", path_of("webhooks", webhook), _WEBHOOK, repeatable=not headers, json=body, headers=headers)


def delete_webhook(webhook: str, *, version: int | None = None) -> Call[None]:
    """With its deliveries. With `version`, only while it is still that one: else ApiError(precondition_failed)."""
    return Call("DELETE", path_of("webhooks", webhook), nothing, headers=if_match(version))


def rotate_secret(webhook: str, *, overlap_s: float = 24 * 3600.0) -> Call[NewWebhookView]:
    """A new secret. For `overlap_s` messages carry the old one's signature too."""
    return post(path_of("webhooks", webhook, "rotate"), _NEW_WEBHOOK, SecretRotate(overlap_s=overlap_s))


def send_test(webhook: str) -> Call[DeliveryView]:
    """Send a message that says nothing, to see whether it comes through."""
    return post(path_of("webhooks", webhook, "test"), _DELIVERY)


def page_deliveries(webhook: str, *, cursor: str | None = None, limit: int = 50) -> Call[Page[DeliveryView]]:
    params = given(cursor=cursor, limit=limit)
    return Call("GET", path_of("webhooks", webhook, "deliveries"), _DELIVERIES, params=params)


def get_delivery(webhook: str, delivery: str) -> Call[DeliveryView]:
    """With every try that was made."""
    return Call("GET", path_of("webhooks", webhook, "deliveries", delivery), _DELIVERY)


def redeliver(webhook: str, delivery: str) -> Call[DeliveryView]:
    """Send it again now, under the same webhook-id, by which a receiver tells it for a repetition."""
    return post(path_of("webhooks", webhook, "deliveries", delivery, "redeliver"), _DELIVERY)


# Keys ----------------------------------------------------------------------------------------------------------------


def create_key(
    name: str,
    scopes: Sequence[str],
    *,
    expires_at: dt.datetime | None = None,
    expires_in_s: float | None = None,
    tenant_id: str | None = None,
) -> Call[NewKeyView]:
    """The key stands in this answer and nowhere else. `tenant_id` is for administrators."""
    body = KeyCreate(
        name=name, scopes=list(scopes), expires_at=expires_at, expires_in_s=expires_in_s, tenant_id=tenant_id
    )
    return post("/v1/keys", _NEW_KEY, body)


def get_key(key_id: str) -> Call[KeyView]:
    return Call("GET", path_of("keys", key_id), _KEY)


def page_keys(*, tenant_id: str | None = None, cursor: str | None = None, limit: int = 50) -> Call[Page[KeyView]]:
    return Call("GET", "/v1/keys", _KEYS, params=given(tenant_id=tenant_id, cursor=cursor, limit=limit))


def rotate_key(key_id: str, *, overlap_s: float = 3600.0) -> Call[NewKeyView]:
    """Its successor, with the same rights. The old one works on for `overlap_s`."""
    return post(path_of("keys", key_id, "rotate"), _NEW_KEY, KeyRotate(overlap_s=overlap_s))


def revoke_key(key_id: str) -> Call[None]:
    return Call("DELETE", path_of("keys", key_id), nothing)


def me() -> Call[MeView]:
    """Whom the key belongs to, what it allows, and what its tenant uses of its quotas."""
    return Call("GET", "/v1/me", _ME)


# Administrators ------------------------------------------------------------------------------------------------------


def page_tenants(*, cursor: str | None = None, limit: int = 50) -> Call[Page[TenantView]]:
    return Call("GET", "/v1/admin/tenants", _TENANTS, params=given(cursor=cursor, limit=limit))


def get_tenant(tenant_id: str) -> Call[TenantView]:
    return Call("GET", path_of("admin", "tenants", tenant_id), _TENANT)


def set_quotas(tenant_id: str, *, version: int | None = None, **quotas: int | None) -> Call[TenantView]:
    """`quotas`: those of core.wire.access.QuotaChange; None gives the installation's own back, 0 means no bound."""
    body = QuotaChange(**quotas).model_dump(mode="json", exclude_unset=True)
    headers = if_match(version)
    path = path_of("admin", "tenants", tenant_id)
    return Call("PATCH", path, _TENANT, repeatable=not headers, json=body, headers=headers)


def page_audit(*, tenant_id: str | None = None, cursor: str | None = None, limit: int = 50) -> Call[Page[AuditView]]:
    """Who did what, newest first."""
    return Call("GET", "/v1/admin/audit", _AUDIT, params=given(tenant_id=tenant_id, cursor=cursor, limit=limit))
