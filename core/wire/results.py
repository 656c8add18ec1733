"""Signatures on the wire."""

import datetime as dt

from nightpress.core.wire.base import View


class SigningKeyView(View):
    """A public key that checks the signatures of this service's artifacts. `id`: the SHA-256 of its PEM form."""

    id: str
    public_key: str  #: PEM
    current: bool  #: whether new artifacts are signed with it
    created_at: dt.datetime
