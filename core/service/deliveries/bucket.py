"""Delivers to a folder of an S3-compatible bucket. A large file goes on with the part at which an earlier attempt stopped."""

import base64
import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import SecretStr

from nightpress.core.artifacts.checks import wrong_checksum
from nightpress.core.artifacts.s3 import in_order, part_size_of
from nightpress.core.artifacts.s3connection import GONE, connect, error_code
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.manifest import ATTESTATION_FILE
from nightpress.core.service.deliveries.addresses import BucketAddress
from nightpress.core.service.deliveries.failures import refused, unavailable
from nightpress.core.service.deliveries.package import Item, Package, Progress
from nightpress.core.service.deliveries.stale import files_of_bundle
from nightpress.core.settings import Settings

_SMALL = 16 * 1024**2
_NOT_ALLOWED = {"403", "AccessDenied", "Forbidden"}
_REFUSED = _NOT_ALLOWED | {
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NoSuchBucket",
    "SignatureDoesNotMatch",
}


class BucketSender:
    """Writes the files below the address's folder, the signed statement last. Files of the result that was there before are deleted then."""

    def __init__(self, address: BucketAddress, secrets: dict[str, str], settings: Settings) -> None:
        own = {
            "s3_access_key_id": SecretStr(secrets["access_key_id"]),
            "s3_secret_access_key": SecretStr(secrets["secret_access_key"]),
        }
        endpoint = settings.destination_s3_endpoint_url or settings.s3_endpoint_url
        self._client = connect(settings.model_copy(update=own), endpoint)
        self._bucket = address.bucket
        self._prefix = f"{address.key}/" if address.key else ""
        self._url = f"s3://{address.bucket}/{address.key}".rstrip("/")

    def close(self) -> None:
        self._client.close()

    def send(self, package: Package, progress: Progress) -> dict[str, Any]:
        with self._errors():
            before = self._files_before()
            for item in package.items:
                if self._is_there(item):
                    progress.claim.skip(item.size)
                elif item.size <= _SMALL:
                    self._put(item, progress)
                else:
                    self._put_parts(item, progress)
            for path in before - {item.path for item in package.items}:
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + path)
        return {"url": self._url, "files": len(package.items), "bytes": package.size}

    def _files_before(self) -> set[str]:
        """The files of the result that was delivered here before, as its own statement names them."""
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + ATTESTATION_FILE)
        except ClientError as error:
            if error_code(error) in GONE | _NOT_ALLOWED:  # a key that may only write is enough
                return set()
            raise
        return files_of_bundle(answer["Body"].read())

    def _is_there(self, item: Item) -> bool:
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + item.path)
        except ClientError as error:
            if error_code(error) in GONE | _NOT_ALLOWED:
                return False
            raise
        return head["ContentLength"] == item.size and head["Metadata"].get("sha256") == item.sha256

    def _put(self, item: Item, progress: Progress) -> None:
        data = item.content()
        if (found := hashlib.sha256(data).hexdigest()) != item.sha256:
            raise wrong_checksum(item.path, item.sha256, found)
        self._client.put_object(
            Bucket=self._bucket,
            Key=self._prefix + item.path,
            Body=data,
            ChecksumSHA256=_base64(hashlib.sha256(data).digest()),
            Metadata={"sha256": item.sha256},
        )
        progress.claim.note(len(data))

    def _put_parts(self, item: Item, progress: Progress) -> None:
        """Send a file as parts, a few at a time. Parts of an earlier attempt aren't sent again."""
        place: dict[str, Any] = {"Bucket": self._bucket, "Key": self._prefix + item.path}
        size = part_size_of(item.size)
        kept = progress.of(item.path)
        upload_id, parts = kept.get("upload_id"), dict(kept.get("parts", {}))
        if upload_id is None:
            made = self._client.create_multipart_upload(
                **place, ChecksumAlgorithm="SHA256", Metadata={"sha256": item.sha256}
            )
            upload_id = made["UploadId"]
            progress.keep(item.path, {"upload_id": upload_id, "parts": parts})
        spans = [
            (number, start, min(start + size, item.size))
            for number, start in enumerate(range(0, item.size, size), 1)
            if str(number) not in parts
        ]
        progress.claim.skip(item.size - sum(end - start for _, start, end in spans))

        def send(span: tuple[int, int, int]) -> tuple[int, int, dict[str, str]]:
            number, start, end = span
            progress.claim.note(0)
            data = b"".join(item.read(start, end))
            checksum = _base64(hashlib.sha256(data).digest())
            answer = self._client.upload_part(
                **place, UploadId=upload_id, PartNumber=number, Body=data, ChecksumSHA256=checksum
            )
            return number, end - start, {"ETag": answer["ETag"], "ChecksumSHA256": checksum}

        try:
            for number, count, part in in_order(send, spans):
                parts[str(number)] = part
                progress.claim.note(count)
                progress.keep(item.path, {"upload_id": upload_id, "parts": parts})
            numbers = range(1, len(parts) + 1)
            self._finish_parts(place, upload_id, [{"PartNumber": n, **parts[str(n)]} for n in numbers])
        except ClientError as error:
            if error_code(error) == "NoSuchUpload":  # it was aborted meanwhile: the next attempt begins a new one
                progress.keep(item.path, {})
            raise
        progress.keep(item.path, {})

    def _finish_parts(self, place: dict[str, Any], upload_id: str, parts: list[Any]) -> None:
        joined: Any = {"Parts": parts}
        self._client.complete_multipart_upload(**place, UploadId=upload_id, MultipartUpload=joined)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except NightpressError:
            raise
        except ClientError as error:
            code = error_code(error)
            said = f"{code} {error.response.get('Error', {}).get('Message', '')}".strip()[:300].rstrip(".")
            raise (refused if code in _REFUSED else unavailable)(self._url, said or "an error") from error
        except BotoCoreError as error:
            raise unavailable(self._url, str(error)[:300].rstrip(".")) from error


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
