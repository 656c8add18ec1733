"""S10: what a presigned URL allows."""

import os
import time
from hashlib import sha256

import httpx
import pytest
from pydantic import SecretStr

from nightpress.core.artifacts.open import open_store
from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings
from tests.servers import S3
from tests.service import MIB


@pytest.fixture
def bucket(s3_server: S3) -> str:
    return s3_server.create_bucket()


@pytest.fixture
def store(s3_server: S3, bucket: str) -> ObjectStore:
    return open_store(
        Settings(
            _env_file=None,
            storage_url=f"s3://{bucket}",
            s3_endpoint_url=s3_server.endpoint,
            s3_access_key_id=SecretStr(s3_server.access_key),
            s3_secret_access_key=SecretStr(s3_server.secret_key),
        )
    )


def _sha(data: bytes) -> str:
    return sha256(data).hexdigest()


@pytest.mark.slow
def test_a_presigned_part_is_for_these_bytes_alone(store: ObjectStore) -> None:
    data = b"the announced bytes"
    upload = store.begin_upload("models/m/w", sha256=_sha(data), signed_parts=True)
    signed = store.presign_part("models/m/w", upload, 1, size=len(data), sha256=_sha(data))
    assert signed is not None

    def put(body: bytes, url: str = signed.url, **headers: str) -> int:
        return httpx.put(url, content=body, headers={**signed.headers, **headers}).status_code

    longer, other = data + b"!", bytes(reversed(data))
    assert put(longer, **{"Content-Length": str(len(longer))}) >= 400
    assert put(other) >= 400
    own = store.presign_part("models/m/w", upload, 1, size=len(data), sha256=_sha(other))
    assert own is not None
    assert put(other, **{"x-amz-checksum-sha256": own.headers["x-amz-checksum-sha256"]}) >= 400
    assert put(data, url=signed.url.replace("models/m/w", "models/other/w")) >= 400
    assert put(data, url=signed.url.replace("partNumber=1", "partNumber=2")) >= 400
    assert httpx.get(signed.url).status_code >= 400
    assert httpx.delete(signed.url).status_code >= 400
    assert store.received_parts("models/m/w", upload) == {}
    assert put(data) == 200
    store.complete_upload("models/m/w", upload, size=len(data), sha256=_sha(data), part_sha256=[_sha(data)])
    assert put(data) >= 400, "an upload that is complete takes nothing more"
    assert b"".join(store.read("models/m/w")) == data


@pytest.mark.slow
def test_a_presigned_url_expires(store: ObjectStore) -> None:
    store.put_bytes("k", b"x")
    url = store.presign_get("k", filename="k", expires_s=1)
    upload = store.begin_upload("u", sha256=_sha(b"x"), signed_parts=True)
    part = store.presign_part("u", upload, 1, size=1, sha256=_sha(b"x"), expires_s=1)
    assert url is not None
    assert part is not None
    time.sleep(2.1)
    assert httpx.get(url).status_code >= 400
    assert httpx.put(part.url, content=b"x", headers=part.headers).status_code >= 400
    assert store.received_parts("u", upload) == {}


def test_a_presigned_url_lists_nothing(store: ObjectStore, s3_server: S3, bucket: str) -> None:
    store.put_bytes("k", b"x")
    url = store.presign_get("k", filename="k")
    assert url is not None
    query = url.split("?", 1)[1]
    assert httpx.get(f"{s3_server.endpoint}/{bucket}?{query}").status_code >= 400
    assert httpx.get(f"{s3_server.endpoint}/{bucket}?list-type=2").status_code >= 400
    assert httpx.get(f"{s3_server.endpoint}/{bucket}/k").status_code >= 400


@pytest.mark.slow
def test_parts_without_a_signed_hash_are_still_verified_before_the_object_counts(store: ObjectStore) -> None:
    data = os.urandom(5 * MIB + 10)
    upload = store.begin_upload("models/m/w", sha256=_sha(data), signed_parts=False)
    tampered = b"!" + data[1:]
    for number, piece in enumerate((tampered[: 5 * MIB], tampered[5 * MIB :]), start=1):
        signed = store.presign_part("models/m/w", upload, number, size=len(piece), sha256=None)
        assert signed is not None
        assert httpx.put(signed.url, content=piece, headers=signed.headers, timeout=30).status_code == 200
    with pytest.raises(NightpressError) as error:
        store.complete_upload("models/m/w", upload, size=len(data), sha256=_sha(data))
    assert error.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert store.stat("models/m/w") is None
