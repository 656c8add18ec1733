"""Objects in an S3-compatible store. Bytes are hashed while they are sent or received, never in a second pass over the file."""

import base64
import contextlib
import datetime as dt
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

from botocore.exceptions import BotoCoreError, ClientError

from nightpress.core.artifacts.checks import exactly, missing_object, valid_key, wrong_checksum
from nightpress.core.artifacts.files import storage_errors, write_atomically
from nightpress.core.artifacts.s3connection import GONE, THREADS, connect, error_code, s3_errors, unavailable
from nightpress.core.artifacts.storage import PRESIGN_S, ObjectInfo, OnBytes, SignedRequest
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings

Item = TypeVar("Item")
Result = TypeVar("Result")

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PART = 16 * 1024**2
_MAX_PARTS = 10_000
_NO_UPLOAD = {"NoSuchUpload", "404"}


class S3Store:
    """The objects below one prefix of one bucket.

    `public`: a client that signs the URLs for clients, if these reach the store at another address.
    """

    def __init__(self, client: "S3Client", bucket: str, prefix: str = "", *, public: "S3Client | None" = None) -> None:
        self._client = client
        self._public = public or client
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    @classmethod
    def from_settings(cls, settings: Settings) -> "S3Store":
        url = urlsplit(settings.objects_url)
        public = settings.s3_public_endpoint_url
        return cls(
            connect(settings, settings.s3_endpoint_url),
            url.netloc,
            url.path,
            public=connect(settings, public) if public else None,
        )

    def put_file(self, key: str, path: Path, *, sha256: str | None = None, on_bytes: OnBytes | None = None) -> None:
        with storage_errors(path.name):
            size = path.stat().st_size
            data = path.read_bytes() if size <= _PART else None
        if data is not None:
            self._put(key, data, sha256)
            if on_bytes is not None:
                on_bytes(len(data))
        else:
            with storage_errors(path.name), path.open("rb", buffering=0) as source:
                part_size = part_size_of(size)
                parts = iter(lambda: source.read(part_size), b"")
                self._put_parts(key, parts, size, sha256, hashlib.sha256() if sha256 else None, on_bytes)

    def put_bytes(self, key: str, data: bytes) -> None:
        self._put(key, data, None)

    def put_pieces(self, key: str, pieces: Iterable[bytes], *, size: int, sha256: str | None = None) -> str:
        exact = exactly(key, pieces, size)
        if size <= _PART:
            data = b"".join(exact)
            self._put(key, data, sha256)
            return hashlib.sha256(data).hexdigest()
        whole = hashlib.sha256()
        self._put_parts(key, _rejoined(exact, part_size_of(size)), size, sha256, whole, None)
        return whole.hexdigest()

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, on_bytes: OnBytes | None = None) -> None:
        with storage_errors(path.name):
            write_atomically(path, _counted(self.read(key), on_bytes), key=key, sha256=sha256, durable=False)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        head = self._head(key)
        if head is None:
            raise missing_object(key)
        stop = head["ContentLength"] if end is None else min(end, head["ContentLength"])
        ranges = [(begin, min(begin + _PART, stop)) for begin in range(start, stop, _PART)]

        def fetch(span: tuple[int, int]) -> bytes:
            # The ETag pins the version, so that pieces of two objects are never mixed.
            # boto3 repeats requests that fail, but not those whose body breaks off: repeat these here.
            for last in (False, False, True):
                answer = self._client.get_object(
                    **self._at(key), Range=f"bytes={span[0]}-{span[1] - 1}", IfMatch=head["ETag"]
                )
                try:
                    return answer["Body"].read()
                except BotoCoreError:
                    if last:
                        raise
            raise AssertionError("unreachable")

        with s3_errors(key):
            if len(ranges) == 1:
                yield fetch(ranges[0])
            elif ranges:
                yield from in_order(fetch, ranges)

    def stat(self, key: str) -> ObjectInfo | None:
        head = self._head(key)
        return None if head is None else ObjectInfo(key, head["ContentLength"], head["LastModified"])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        below = f"{valid_key(prefix.rstrip('/'))}/" if prefix else ""
        with s3_errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + below
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    if not entry["Key"].endswith("/"):
                        yield ObjectInfo(entry["Key"].removeprefix(self._prefix), entry["Size"], entry["LastModified"])

    def delete_prefix(self, prefix: str) -> int:
        key = valid_key(prefix.rstrip("/"))
        keys = [info.key for info in self.list(key)] + [key] * (self.stat(key) is not None)
        with s3_errors(prefix):
            for begin in range(0, len(keys), 1000):
                batch: Any = [{"Key": self._prefix + key} for key in keys[begin : begin + 1000]]
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True})
                for fault in answer.get("Errors", []):
                    raise unavailable(prefix, f"{fault.get('Code')}: {fault.get('Message')}")
        return len(keys)

    def presign_get(self, key: str, *, filename: str, expires_s: int = PRESIGN_S) -> str | None:
        disposition = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        return self._public.generate_presigned_url(
            "get_object", Params={**self._at(key), "ResponseContentDisposition": disposition}, ExpiresIn=expires_s
        )

    # Uploads -----------------------------------------------------------------------------------------------------

    def begin_upload(self, key: str, *, sha256: str, signed_parts: bool) -> str:
        extra: dict[str, Any] = {"ChecksumAlgorithm": "SHA256"} if signed_parts else {}
        with s3_errors(key):
            answer = self._client.create_multipart_upload(**self._at(key), Metadata={"sha256": sha256}, **extra)
        return answer["UploadId"]

    def presign_part(
        self, key: str, upload_id: str, number: int, *, size: int, sha256: str | None, expires_s: int = PRESIGN_S
    ) -> SignedRequest | None:
        headers = {"Content-Length": str(size)}
        params = {**self._at(key), "UploadId": upload_id, "PartNumber": number, "ContentLength": size}
        if sha256 is not None:
            headers["x-amz-checksum-sha256"] = params["ChecksumSHA256"] = _base64(bytes.fromhex(sha256))
        url = self._public.generate_presigned_url("upload_part", Params=params, ExpiresIn=expires_s)
        return SignedRequest(url, headers)

    def receive_part(
        self,
        key: str,
        upload_id: str,  # noqa: ARG002 - a part of a store that takes them by presigned URL
        number: int,  # noqa: ARG002
        pieces: Iterable[bytes],  # noqa: ARG002
        *,
        size: int,  # noqa: ARG002
        sha256: str | None,  # noqa: ARG002
    ) -> None:
        raise NightpressError(
            ErrorCode.CONFLICT,
            f"Parts of {key} go straight to the object store.",
            hint="PUT them to the presigned `url` that the upload's parts name.",
        )

    def received_parts(self, key: str, upload_id: str) -> dict[int, int]:
        return {part["PartNumber"]: part["Size"] for part in self._list_parts(key, upload_id)}

    def complete_upload(
        self, key: str, upload_id: str, *, size: int, sha256: str, part_sha256: Sequence[str] = ()
    ) -> None:
        with s3_errors(key):
            parts = [
                {"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in self._list_parts(key, upload_id)
            ]
            for part, digest in zip(parts, part_sha256, strict=False):
                part["ChecksumSHA256"] = _base64(bytes.fromhex(digest))
            if parts:
                self._join(key, upload_id, parts)
        info = self.stat(key)
        if info is None:
            raise NightpressError(
                ErrorCode.NOT_FOUND,
                f"There is no open upload of {key}.",
                hint="It was completed, aborted or swept away.",
                key=key,
            )
        found = hashlib.sha256()
        if info.size == size:
            for piece in self.read(key):
                found.update(piece)
        if info.size != size or found.hexdigest() != sha256:
            self.delete_prefix(key)
            raise wrong_checksum(key, sha256, found.hexdigest())

    def abort_upload(self, key: str, upload_id: str) -> None:
        # Some stores destroy the finished object when a leftover upload of the same key is aborted. So never abort if the object exists.
        if self._head(key) is not None:
            return
        with s3_errors(key):
            try:
                self._client.abort_multipart_upload(**self._at(key), UploadId=upload_id)
            except ClientError as error:
                if error_code(error) not in _NO_UPLOAD:
                    raise

    def sweep_uploads(self, older_than_s: float) -> int:
        count = 0
        with s3_errors(self._prefix):
            pages = list(
                self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix)
            )
            limit = _clock(pages[0]) - dt.timedelta(seconds=older_than_s)
            leftovers = [upload for page in pages for upload in page.get("Uploads", [])]
        for upload in leftovers:
            key = upload["Key"].removeprefix(self._prefix)
            if upload["Initiated"] < limit and self._head(key) is None:
                self.abort_upload(key, upload["UploadId"])
                count += 1
        return count

    def check(self) -> None:
        probe: dict[str, Any] = {"Bucket": self._bucket, "Key": f"{self._prefix}.np-check"}
        with s3_errors("the bucket"):
            self._client.put_object(**probe, Body=b"x")
            self._client.delete_object(**probe)

    # ---------------------------------------------------------------------------------------------------------------

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + valid_key(key)}

    def _head(self, key: str) -> Any:
        with s3_errors(key):
            try:
                return self._client.head_object(**self._at(key))
            except ClientError as error:
                if error_code(error) in GONE:
                    return None
                raise

    def _list_parts(self, key: str, upload_id: str) -> Sequence[Any]:
        with s3_errors(key):
            try:
                pages = self._client.get_paginator("list_parts").paginate(**self._at(key), UploadId=upload_id)
                return [part for page in pages for part in page.get("Parts", [])]
            except ClientError as error:
                if error_code(error) in _NO_UPLOAD:
                    return []
                raise

    def _put(self, key: str, data: bytes, sha256: str | None) -> None:
        digest = hashlib.sha256(data)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise wrong_checksum(key, sha256, digest.hexdigest())
        with s3_errors(key):
            self._client.put_object(
                **self._at(key),
                Body=data,
                ChecksumSHA256=_base64(digest.digest()),
                Metadata={"sha256": digest.hexdigest()},
            )

    def _put_parts(
        self,
        key: str,
        pieces: Iterable[bytes],
        size: int,
        sha256: str | None,
        whole: "hashlib._Hash | None",
        on_bytes: OnBytes | None,
    ) -> None:
        """Upload the pieces as parts, a few at a time. Pieces have the part's full size, but for the last.

        `whole`: a hash that is updated with every byte; None if the digest of the object is not needed.
        """
        metadata = {"sha256": sha256} if sha256 is not None else {}
        with s3_errors(key):
            upload_id = self._client.create_multipart_upload(
                **self._at(key), ChecksumAlgorithm="SHA256", Metadata=metadata
            )["UploadId"]

        def numbered() -> Iterator[tuple[int, bytes]]:
            for number, piece in enumerate(pieces, 1):
                if whole is not None:
                    whole.update(piece)
                yield number, piece

        def send(item: tuple[int, bytes]) -> dict[str, Any]:
            number, piece = item
            checksum = _base64(hashlib.sha256(piece).digest())
            answer = self._client.upload_part(
                **self._at(key), UploadId=upload_id, PartNumber=number, Body=piece, ChecksumSHA256=checksum
            )
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum, "Size": len(piece)}

        try:
            with s3_errors(key):
                parts = []
                for part in in_order(send, numbered()):
                    parts.append(part)
                    if on_bytes is not None:
                        on_bytes(part["Size"])
                sent = sum(part["Size"] for part in parts)
                found = whole.hexdigest() if whole is not None else ""
                if sent != size or (sha256 is not None and found != sha256):
                    raise wrong_checksum(key, sha256 or "", found)
                self._join(key, upload_id, parts)
        except BaseException:
            with contextlib.suppress(NightpressError):  # report the first error; the sweep removes what is left
                self.abort_upload(key, upload_id)
            raise

    def _join(self, key: str, upload_id: str, parts: Sequence[Any]) -> None:
        names = ("PartNumber", "ETag", "ChecksumSHA256")
        named: Any = [{name: part[name] for name in names if name in part} for part in parts]
        try:
            self._client.complete_multipart_upload(
                **self._at(key), UploadId=upload_id, MultipartUpload={"Parts": named}
            )
        except ClientError as error:
            # This may repeat a request whose answer was lost. If the object exists, the first request succeeded.
            if error_code(error) not in _NO_UPLOAD or self._head(key) is None:
                raise


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply `work` in `THREADS` threads and yield the results in order. Only a few items are in memory, whatever the object's size."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _counted(pieces: Iterable[bytes], on_bytes: OnBytes | None) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        if on_bytes is not None:
            on_bytes(len(piece))


def _clock(answer: Mapping[str, Any]) -> dt.datetime:
    """The store's own time. The times of uploads are compared with it."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).astimezone(dt.UTC)


def part_size_of(size: int) -> int:
    return max(_PART, -(-size // _MAX_PARTS))


def _rejoined(pieces: Iterable[bytes], part_size: int) -> Iterator[bytes]:
    """The same bytes in pieces of `part_size` bytes. Only the last piece may be smaller."""
    part = bytearray()
    for piece in pieces:
        part += piece
        while len(part) >= part_size:
            yield bytes(part[:part_size])
            del part[:part_size]
    if part:
        yield bytes(part)


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
