"""Encrypts the credentials that tenants store. A dump of the database holds no credential in plain text.

Fernet (AES-128-CBC and HMAC-SHA256) by keys that are derived from NIGHTPRESS_CREDENTIAL_KEYS. The first key encrypts, every key decrypts: an
operator puts a new key in front, and the control process encrypts the stored credentials again.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.secret_key import installation_key
from nightpress.core.settings import Settings

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet


class Vault:
    """Seals small mappings of text. Each is bound to its owner, so that a sealed text copied to another row can't be opened there."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = [hmac.digest(key, b"credentials/fernet/1", "sha256") for key in keys]
        #: names the key that seals, without telling anything about it
        self.key_id = hashlib.sha256(b"key id" + self._keys[0]).hexdigest()[:16]

    @cached_property
    def _fernet(self) -> "MultiFernet":
        # Imported at the first use, which most processes never come to: the import takes some hundredths of a second.
        from cryptography.fernet import Fernet, MultiFernet

        return MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in self._keys])

    def seal(self, owner: str, secret: Mapping[str, str]) -> str:
        plain = json.dumps({"owner": owner, "secret": dict(secret)}).encode()
        return self._fernet.encrypt(plain).decode()

    def open(self, owner: str, sealed: str) -> dict[str, str]:
        """Raises NightpressError(destination_refused) if no key of this installation opens it, or if it belongs to another owner."""
        from cryptography.fernet import InvalidToken

        try:
            found = json.loads(self._fernet.decrypt(sealed.encode()))
        except InvalidToken as error:
            raise _not_opened("no key of this installation opens them") from error
        if found["owner"] != owner:
            raise _not_opened("they were stored for another destination")
        return {str(name): str(value) for name, value in found["secret"].items()}


def open_vault(settings: Settings) -> Vault:
    """The vault of this installation. Raises NightpressError(internal) if the installation's key is damaged."""
    given = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in settings.credential_keys]
    # Also the derived key, so that credentials from before CREDENTIAL_KEYS was set can be read.
    return Vault([*given, installation_key(settings)])


def _not_opened(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.DESTINATION_REFUSED,
        f"The stored credentials can't be read: {why}.",
        hint="Store them again: `nightpress credentials rotate`. Operators: keep old keys at the end of NIGHTPRESS_CREDENTIAL_KEYS.",
    )
