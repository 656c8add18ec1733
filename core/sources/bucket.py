"""A folder of an S3-compatible bucket, or one object in it, read with the operator's credentials."""

import contextlib
from collections.abc import Iterator

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from nightpress.core.artifacts.s3connection import GONE, connect, error_code
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings
from nightpress.core.sources.address import BucketAddress
from nightpress.core.sources.source import Listing, RemoteFile, refused, revision_of, unavailable

_MAX_OBJECTS = 10_000
_PIECE = 8 * 1024**2
_REFUSED = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_CHANGED = {"412", "PreconditionFailed"}


class BucketSource:
    """A source in a bucket. Its revision is a digest of the path, size and ETag of every object."""

    def __init__(self, address: BucketAddress, settings: Settings) -> None:
        own = {
            "s3_access_key_id": settings.source_s3_access_key_id or settings.s3_access_key_id,
            "s3_secret_access_key": settings.source_s3_secret_access_key or settings.s3_secret_access_key,
        }
        endpoint = settings.source_s3_endpoint_url or settings.s3_endpoint_url
        self._client = connect(settings.model_copy(update=own), endpoint)
        self._address = address
        folder = address.key if address.kind == "models" else address.key.rpartition("/")[0]
        self._prefix = f"{folder}/" if folder else ""

    def close(self) -> None:
        self._client.close()

    def listing(self) -> Listing:
        with self._errors():
            files = self._folder() if self._address.kind == "models" else self._one_object()
        if not files:
            raise NightpressError(
                ErrorCode.NOT_FOUND, f"There is nothing at {self._address.url}.", hint="Is the folder spelled so?"
            )
        return Listing(revision_of(f"{file.path}\0{file.size}\0{file.version}" for file in files), tuple(files))

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        with self._errors():
            # The ETag pins the version, so that pieces of two objects are never mixed.
            answer = self._client.get_object(
                Bucket=self._address.bucket,
                Key=self._prefix + file.path,
                Range=f"bytes={start}-",
                IfMatch=file.version,
            )
            body = answer["Body"]
            try:
                yield from body.iter_chunks(_PIECE)
            finally:
                body.close()

    def _one_object(self) -> list[RemoteFile]:
        head = self._client.head_object(Bucket=self._address.bucket, Key=self._address.key)
        return [RemoteFile(self._address.key.removeprefix(self._prefix), head["ContentLength"], head["ETag"])]

    def _folder(self) -> list[RemoteFile]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._address.bucket, Prefix=self._prefix)
        found: list[RemoteFile] = []
        for page in pages:
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):
                    path = entry["Key"].removeprefix(self._prefix)
                    found.append(RemoteFile(path, entry["Size"], entry["ETag"]))
            if len(found) > _MAX_OBJECTS:
                raise NightpressError(
                    ErrorCode.INVALID_REQUEST,
                    f"{self._address.url} holds more than {_MAX_OBJECTS} objects.",
                    hint="Name the folder of one model.",
                )
        return found

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        where = self._address.url
        credentials = (
            "Ask the operator to set NIGHTPRESS_SOURCE_S3_ACCESS_KEY_ID and its secret to a key that may read it."
        )
        try:
            yield
        except ClientError as error:
            code = error_code(error)
            if code in GONE | {"NoSuchBucket"}:
                missing = "bucket" if code == "NoSuchBucket" else "object"
                raise NightpressError(
                    ErrorCode.NOT_FOUND, f"There is no such {missing}: {where}.", hint="Is it spelled so?"
                ) from error
            if code in _REFUSED:
                raise refused(where, credentials) from error
            if code in _CHANGED:
                raise unavailable(where, "an object was replaced while it was read") from error
            raise unavailable(where, code or "the store answered with an error") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise refused(where, credentials) from error
        except BotoCoreError as error:
            raise unavailable(where, str(error).rstrip(".")) from error
