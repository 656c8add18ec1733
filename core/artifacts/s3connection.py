"""The connection to an S3-compatible store, and the translation of its errors."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from nightpress.core.artifacts.checks import missing_object
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

THREADS = 4  #: requests in flight for one file
GONE = {"404", "NoSuchKey", "NotFound"}
_REFUSED = {
    "403",
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}
_BAD_BYTES = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}


def connect(settings: Settings, endpoint: str | None) -> "S3Client":
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.s3_region,
        aws_access_key_id=key.get_secret_value() if key else None,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=Config(
            signature_version="s3v4",
            connect_timeout=3,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": 4},
            max_pool_connections=4 * THREADS,
            # The SHA-256 of every body is sent as a signed header. An additional CRC or a second SHA-256 of the payload would add nothing.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if endpoint else "auto", "payload_signing_enabled": False},
        ),
    )


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def unavailable(what: str, why: str, *, refused: bool = False) -> NightpressError:
    """The error storage_unavailable. `refused`: the store answers, but does not accept this machine's credentials or clock."""
    return NightpressError(
        ErrorCode.STORAGE_UNAVAILABLE,
        f"The object store did not do what was asked of {what}: {why}.",
        hint="Try again in a minute; `nightpress doctor` shows whether address, bucket and keys are right.",
        **({"refused": True} if refused else {}),
    )


@contextlib.contextmanager
def s3_errors(what: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = error_code(error)
        if code in GONE:
            raise missing_object(what) from error
        if code in _BAD_BYTES:
            raise NightpressError(
                ErrorCode.CHECKSUM_MISMATCH,
                f"The object store received other bytes of {what} than were sent.",
                hint="Nothing was kept. Try again; if it happens twice, something between here and the store alters data.",
                key=what,
            ) from error
        said = f"{code or 'error'} {error.response.get('Error', {}).get('Message', '')}".strip()
        raise unavailable(what, said, refused=code in _REFUSED) from error
    except BotoCoreError as error:
        refused = isinstance(error, NoCredentialsError | PartialCredentialsError)
        raise unavailable(what, str(error).rstrip("."), refused=refused) from error
