"""The file of sign-ins, by the server's address, and the token that a client sends. Only its owner may read the file."""

import json
import os
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nightpress.client import device_flow
from nightpress.client.errors import ClientError
from nightpress.client.servers import servers_file

if TYPE_CHECKING:
    from filelock import FileLock

_EARLY_S = 30.0  #: a token is refreshed so long before it expires, for clocks that differ


@dataclass(frozen=True)
class SignedIn:
    """A sign-in. `expires_at`: Unix seconds, of the ID token. `tenant`: where to act; None: in the first of the person's tenants."""

    issuer: str
    client_id: str
    token_url: str
    id_token: str
    expires_at: float
    refresh_token: str | None
    tenant: str | None = None


def sign_ins_file() -> Path:
    return servers_file().with_name("sign-ins.json")


def read_sign_in(api_url: str) -> SignedIn | None:
    """The sign-in at this server. None without one. Raises ClientError for a file that can't be read."""
    return _read().get(api_url)


def save_sign_in(api_url: str, signed_in: SignedIn | None) -> Path:
    """Store a sign-in, or remove it with None. Returns the file's path."""
    with _lock():
        return _write(_read() | {api_url: signed_in})


class SignInTokens:
    """The ID token for a server, refreshed before it expires. Safe to share between threads, and between processes by the file's lock."""

    def __init__(self, api_url: str, signed_in: SignedIn) -> None:
        self._api_url = api_url
        self._signed_in = signed_in
        self._lock = threading.Lock()

    @property
    def tenant(self) -> str | None:
        return self._signed_in.tenant

    def token(self) -> str:
        """Raises ClientError where the sign-in has ended. Waits for the provider when the token must be refreshed."""
        with self._lock:
            if not _is_fresh(self._signed_in):
                self._signed_in = self._renewed()
            return self._signed_in.id_token

    def _renewed(self) -> SignedIn:
        """The sign-in with new tokens. A refresh token works once: another process may have used it and stored its successor."""
        with _lock():
            stored = _read().get(self._api_url)
            if stored is None:
                raise ClientError("You have signed out.", hint="Run `nightpress login`.")
            if _is_fresh(stored):
                return stored
            if stored.refresh_token is None:
                raise ClientError("Your sign-in has expired.", hint="Run `nightpress login` again.")
            tokens = device_flow.refresh(stored.issuer, stored.token_url, stored.client_id, stored.refresh_token)
            renewed = replace(stored, **asdict(tokens))
            _write(_read() | {self._api_url: renewed})
            return renewed


def _is_fresh(signed_in: SignedIn) -> bool:
    return time.time() < signed_in.expires_at - _EARLY_S


def _lock() -> "FileLock":
    from filelock import FileLock  # 0.05 s, and only people who signed in need it

    path = sign_ins_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return FileLock(path.with_suffix(".lock"), mode=0o600)


def _read() -> dict[str, SignedIn | None]:
    path = sign_ins_file()
    try:
        return {url: SignedIn(**entry) for url, entry in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ClientError(
            f"{path} can't be read: {error}.", hint="Remove it, and run `nightpress login` again."
        ) from error


def _write(entries: dict[str, SignedIn | None]) -> Path:
    path = sign_ins_file()
    kept = {url: asdict(entry) for url, entry in entries.items() if entry is not None}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mkstemp makes it 0600
    with os.fdopen(descriptor, "w") as stream:
        json.dump(kept, stream)
    Path(temporary).replace(path)
    return path
