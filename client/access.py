"""Calls about access and notification: webhooks, keys, sessions, tenants with their quotas, and the audit log. Nothing is sent here."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

from nightpress.client.calls import Call, if_match, nothing, path_of, plain_text, post, query, reader
from nightpress.core.wire.access import (
    AuditView,
    KeyCreate,
    KeyRotate,
    KeyView,
    NewKeyView,
    ProviderView,
    QuotaChange,
    SessionView,
    TenantView,
)
from nightpress.core.wire.base import Page
from nightpress.core.wire.costs import SpendingView
from nightpress.core.wire.system import MeView
from nightpress.core.wire.webhooks import (
    DeliveryView,
    NewWebhookView,
    SecretRotate,
    WebhookCreate,
    WebhookEvent,
    WebhookKind,
    WebhookUpdate,
    WebhookView,
)

_WEBHOOK, _WEBHOOKS, _NEW_WEBHOOK = reader(WebhookView), reader(Page[WebhookView]), reader(NewWebhookView)
_DELIVERY, _DELIVERIES = reader(DeliveryView), reader(Page[DeliveryView])
_KEY, _KEYS, _NEW_KEY = reader(KeyView), reader(Page[KeyView]), reader(NewKeyView)
_TENANT, _TENANTS, _AUDIT = reader(TenantView), reader(Page[TenantView]), reader(Page[AuditView])
_ME, _PROVIDER, _SESSIONS = reader(MeView), reader(ProviderView), reader(Page[SessionView])
_SPENDING = reader(SpendingView)

# Webhooks ------------------------------------------------------------------------------------------------------------


def create_webhook(
    url: str, events: Sequence[WebhookEvent], *, kind: WebhookKind = "standard", template: str = ""
) -> Call[NewWebhookView]:
    """Have the service call `url` on these events. Only this answer holds the secret that signs messages of the kind `standard`.

    kind: `slack` sends a text to an incoming webhook, `email` a mail to `mailto:…`. template: their text, with fields such as `$model`.
    """
    wanted = WebhookCreate(url=url, events=list(events), kind=kind, template=template)
    return post("/v1/webhooks", _NEW_WEBHOOK, wanted)


def get_promotions_feed(model: str) -> Call[str]:
    """The last fifty promotions of a model's name as an Atom feed."""
    return Call("GET", path_of("models", model, "promotions.atom"), plain_text)


def get_webhook(webhook: str) -> Call[WebhookView]:
    return Call("GET", path_of("webhooks", webhook), _WEBHOOK)


def page_webhooks(*, cursor: str | None = None, limit: int = 50) -> Call[Page[WebhookView]]:
    return Call("GET", "/v1/webhooks", _WEBHOOKS, params=query(cursor=cursor, limit=limit))


def edit_webhook(webhook: str, *, version: int | None = None, **changes: Any) -> Call[WebhookView]:
    """Change the given fields of core.wire.webhooks.WebhookUpdate: url, events, template, enabled.

    With `version`, raises ApiError(precondition_failed) where the webhook has been changed since that version.
    """
    body = WebhookUpdate(**changes).model_dump(mode="json", exclude_unset=True)
    headers = if_match(version)
    return Call("PATCH", path_of("webhooks", webhook), _WEBHOOK, repeatable=not headers, json=body, headers=headers)


def delete_webhook(webhook: str, *, version: int | None = None) -> Call[None]:
    """Delete a webhook and its deliveries. With `version`, raises ApiError(precondition_failed) where it has been changed since."""
    return Call("DELETE", path_of("webhooks", webhook), nothing, headers=if_match(version))


def rotate_secret(webhook: str, *, overlap_s: float = 24 * 3600.0) -> Call[NewWebhookView]:
    """Make a new secret. For `overlap_s` seconds messages carry signatures by both secrets."""
    return post(path_of("webhooks", webhook, "rotate"), _NEW_WEBHOOK, SecretRotate(overlap_s=overlap_s))


def send_test(webhook: str) -> Call[DeliveryView]:
    """Send a test message. Returns its delivery, which says later what came of it."""
    return post(path_of("webhooks", webhook, "test"), _DELIVERY)


def page_deliveries(webhook: str, *, cursor: str | None = None, limit: int = 50) -> Call[Page[DeliveryView]]:
    """A page of the messages to a webhook, newest first."""
    params = query(cursor=cursor, limit=limit)
    return Call("GET", path_of("webhooks", webhook, "deliveries"), _DELIVERIES, params=params)


def get_delivery(webhook: str, delivery: str) -> Call[DeliveryView]:
    """A message to a webhook, with every try to send it."""
    return Call("GET", path_of("webhooks", webhook, "deliveries", delivery), _DELIVERY)


def redeliver(webhook: str, delivery: str) -> Call[DeliveryView]:
    """Send a message again now. It keeps its webhook-id, so that its receiver can recognise a repetition."""
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
    """Make a key. Only this answer holds it. `tenant_id`, for administrators: the tenant that it belongs to."""
    body = KeyCreate(
        name=name, scopes=list(scopes), expires_at=expires_at, expires_in_s=expires_in_s, tenant_id=tenant_id
    )
    return post("/v1/keys", _NEW_KEY, body)


def get_key(key_id: str) -> Call[KeyView]:
    return Call("GET", path_of("keys", key_id), _KEY)


def page_keys(*, tenant_id: str | None = None, cursor: str | None = None, limit: int = 50) -> Call[Page[KeyView]]:
    return Call("GET", "/v1/keys", _KEYS, params=query(tenant_id=tenant_id, cursor=cursor, limit=limit))


def rotate_key(key_id: str, *, overlap_s: float = 3600.0) -> Call[NewKeyView]:
    """Make a new key with the same rights. The old key keeps working for `overlap_s` seconds."""
    return post(path_of("keys", key_id, "rotate"), _NEW_KEY, KeyRotate(overlap_s=overlap_s))


def revoke_key(key_id: str) -> Call[None]:
    """End a key for good. It stops working within five seconds."""
    return Call("DELETE", path_of("keys", key_id), nothing)


def me() -> Call[MeView]:
    """The tenant and scopes of the key in use, and how much of its quotas the tenant uses."""
    return Call("GET", "/v1/me", _ME)


def get_spending(*, days: int = 31, tenant_id: str | None = None) -> Call[SpendingView]:
    """What a tenant has spent on each of the last days, newest first. `tenant_id`, for administrators: another tenant."""
    return Call("GET", "/v1/costs", _SPENDING, params=query(days=days, tenant_id=tenant_id))


# Signing in ----------------------------------------------------------------------------------------------------------


def sign_in_provider() -> Call[ProviderView]:
    """The OpenID Connect provider that people sign in with. Needs no key. Its issuer is empty where keys alone are taken."""
    return Call("GET", "/auth/provider", _PROVIDER)


def page_sessions(*, cursor: str | None = None, limit: int = 50) -> Call[Page[SessionView]]:
    """A page of the tenant's sessions of the web page, newest first."""
    return Call("GET", "/v1/sessions", _SESSIONS, params=query(cursor=cursor, limit=limit))


def end_session(session_id: str) -> Call[None]:
    """End a session. It stops working within five seconds; the person can sign in again."""
    return Call("DELETE", path_of("sessions", session_id), nothing)


# Administrators ------------------------------------------------------------------------------------------------------


def page_tenants(*, cursor: str | None = None, limit: int = 50) -> Call[Page[TenantView]]:
    return Call("GET", "/v1/admin/tenants", _TENANTS, params=query(cursor=cursor, limit=limit))


def get_tenant(tenant_id: str) -> Call[TenantView]:
    return Call("GET", path_of("admin", "tenants", tenant_id), _TENANT)


def set_quotas(tenant_id: str, *, version: int | None = None, **quotas: int | None) -> Call[TenantView]:
    """Change the given quotas of core.wire.access.QuotaChange. None: the installation's default. 0: unlimited.

    With `version`, raises ApiError(precondition_failed) where the quotas have been changed since that version.
    """
    body = QuotaChange(**quotas).model_dump(mode="json", exclude_unset=True)
    headers = if_match(version)
    path = path_of("admin", "tenants", tenant_id)
    return Call("PATCH", path, _TENANT, repeatable=not headers, json=body, headers=headers)


def page_audit(*, tenant_id: str | None = None, cursor: str | None = None, limit: int = 50) -> Call[Page[AuditView]]:
    """A page of what keys have changed, newest first."""
    return Call("GET", "/v1/admin/audit", _AUDIT, params=query(tenant_id=tenant_id, cursor=cursor, limit=limit))
