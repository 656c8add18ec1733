"""Signatures of Standard Webhooks (standardwebhooks.com): HMAC-SHA256 over id, timestamp and body.

The secrets are derived from the installation's key and never stored.
"""

import base64
import binascii
import hashlib
import hmac
import os
import time
from collections.abc import Mapping, Sequence

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.numbers import whole_number
from nightpress.core.settings import Settings

PREFIX = "whsec_"
TOLERANCE_S = 300.0
_KEY_BYTES = 32


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
    """Take the key from NIGHTPRESS_SECRET_KEY, else from a file in the data folder, which the first process creates.

    Raises NightpressError(internal) if the file is damaged.
    """
    if settings.secret_key is not None:
        return SecretKeeper(hashlib.sha256(settings.secret_key.get_secret_value().encode()).digest())
    path = settings.data_dir / "secret"
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f"secret.{os.getpid()}")
    if not path.exists():
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(os.urandom(_KEY_BYTES))
        try:
            os.link(partial, path)  # fails instead of replacing the key of another process
        except FileExistsError:
            pass  # two processes started at the same time: use the key of the first
        finally:
            partial.unlink()
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise NightpressError(
            ErrorCode.INTERNAL,
            f"{path} holds {len(key)} bytes, not {_KEY_BYTES}: it was cut off or overwritten.",
            hint="Restore it from a backup; or move it away, and rotate every webhook's secret after the start.",
        )
    return SecretKeeper(key)


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
