"""The installation's key. Webhooks' secrets, the signing key and the key of stored credentials are derived from it."""

import hashlib
import os

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings

_KEY_BYTES = 32


def installation_key(settings: Settings) -> bytes:
    """The 32 bytes from NIGHTPRESS_SECRET_KEY, else from a file in the data folder, which the first process creates.

    Raises NightpressError(internal) if the file is damaged.
    """
    if settings.secret_key is not None:
        return hashlib.sha256(settings.secret_key.get_secret_value().encode()).digest()
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
    return key
