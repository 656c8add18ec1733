"""Signatures of Standard Webhooks (standardwebhooks.com): HMAC-SHA256 over id, timestamp and body.

The secrets are derived from the installation's key and never stored.
"""

import base64
import binascii
import hmac
import time
from collections.abc import Mapping, Sequence

from nightpress.core.numbers import whole_number
from nightpress.core.service.secret_key import installation_key
from nightpress.core.settings import Settings

PREFIX = "whsec_"
TOLERANCE_S = 300.0


class SecretKeeper:
    """Derives the secrets of webhooks from the installation's key, so that a dump of the database holds no secret."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def secret(self, webhook_id: str, generation: int) -> str:
        """A webhook's secret in the form `whsec_…`, which the receiver needs."""
        info = f"webhook/{webhook_id}/{generation}".encode()
        return PREFIX + base64.b64encode(hmac.digest(self._key, info, "sha256")).decode()

    def key_for(self, purpose: str) -> bytes:
        """32 bytes for another purpose, e.g. to encrypt with."""
        return hmac.digest(self._key, purpose.encode(), "sha256")


def open_keeper(settings: Settings) -> SecretKeeper:
    """The keeper of this installation. Raises NightpressError(internal) if the key's file is damaged."""
    return SecretKeeper(installation_key(settings))


def sign(secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of a message. `timestamp`: Unix seconds. There is one signature per secret in `secrets`."""
    signatures = " ".join(f"v1,{_signature(secret, message_id, timestamp, body)}" for secret in secrets)
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": signatures}


def verify(secret: str, headers: Mapping[str, str], body: bytes, *, now: float | None = None) -> bool:
    """Check a message, for receivers. False for a changed body, another secret, or a timestamp more than five minutes off.

    `headers`: with lower-case names, as most frameworks provide them. `now`: Unix seconds; None: this host's clock.
    """
    message_id, stamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    moment = time.time() if now is None else now
    sent_at = whole_number(stamp)
    if sent_at is None or abs(moment - sent_at) > TOLERANCE_S:
        return False
    expected = _signature(secret, message_id, sent_at, body)
    given = [
        signature.removeprefix("v1,")
        for signature in headers.get("webhook-signature", "").split()
        if signature.startswith("v1,")
    ]
    return any(hmac.compare_digest(expected.encode(), signature.encode()) for signature in given)


def _signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError("a webhook's secret is base64 behind whsec_") from error
    return base64.b64encode(hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, "sha256")).decode()
