"""Which files at a destination belong to the result that was delivered there before."""

import base64
import binascii
import json

from pydantic import ValidationError

from nightpress.core.handoff.attestation import REPORT_NAMES
from nightpress.core.handoff.manifest import ATTESTATION_FILE, FileEntry


def files_of_bundle(raw: bytes) -> set[str]:
    """The files that a delivered result has, by its own statement. Empty if the statement can't be read.

    These are deleted when another result takes the place. Other files at the destination are not ours, and stay. The signature is not checked:
    who can write there can delete there as well.
    """
    try:
        statement = json.loads(base64.b64decode(json.loads(raw)["dsseEnvelope"]["payload"]))
        names = [entry["name"] for entry in statement["predicate"]["resources"]]
        # Only plain relative paths: the statement may have been written by somebody else.
        plain = {FileEntry(path=name, size=0, sha256="0" * 64).path for name in names}
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error, ValidationError):
        return set()
    return plain | {ATTESTATION_FILE, "README.md"} | (set(REPORT_NAMES) - {"report.md"})
