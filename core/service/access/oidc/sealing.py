"""Encrypts what Nightpress gives away or stores and alone may read: cookies of unfinished sign-ins, and refresh tokens."""

import json
from typing import Any

from joserfc import jwe
from joserfc.errors import JoseError
from joserfc.jwk import OctKey

_HEADER = {"alg": "dir", "enc": "A256GCM"}
_ALGORITHMS = ["dir", "A256GCM"]


class Seal:
    """AES-256-GCM with one key for each purpose, as JSON Web Encryption. `key`: 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._key = OctKey.import_key(key)

    def close(self, content: dict[str, Any]) -> str:
        return jwe.encrypt_compact(dict(_HEADER), json.dumps(content), self._key, algorithms=_ALGORITHMS)

    def open(self, sealed: str) -> dict[str, Any] | None:
        """The content; None if it was made with another key, or changed."""
        try:
            opened = jwe.decrypt_compact(sealed, self._key, algorithms=_ALGORITHMS)
            content = json.loads(opened.plaintext or b"")
        except (JoseError, ValueError, TypeError):
            return None
        return content if isinstance(content, dict) else None
