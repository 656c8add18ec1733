"""The key that signs statements about artifacts. It is derived from the installation's key and never stored."""

import hmac

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from nightpress.core.handoff.attestation import private_key_from
from nightpress.core.service.secret_key import installation_key
from nightpress.core.settings import Settings


def signing_key(settings: Settings) -> EllipticCurvePrivateKey:
    """The P-256 key of this installation. Another NIGHTPRESS_SECRET_KEY gives another key.

    Raises NightpressError(internal) if the installation's key is damaged.
    """
    return private_key_from(hmac.digest(installation_key(settings), b"signing/p256/1", "sha512"))
