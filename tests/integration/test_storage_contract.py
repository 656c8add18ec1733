"""The contract of every object store, tested with local folders and with a real S3 server."""

import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from nightpress.core.artifacts.local import LocalStore
from nightpress.core.artifacts.open import open_store
from nightpress.core.artifacts.s3 import S3Store
from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings
from tests.servers import S3

MIB = 1024**2
PART = 5 * MIB  # S3's smallest part; only the last part may be smaller


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def s3_settings(server: S3, bucket: str, **more: object) -> Settings:
    return Settings(
        _env_file=None,
        storage_url=f"s3://{bucket}/press",
        s3_endpoint_url=server.endpoint,
        s3_access_key_id=SecretStr(server.access_key),
        s3_secret_access_key=SecretStr(server.secret_key),
        **more,
    )


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "local":
        return open_store(Settings(_env_file=None, data_dir=tmp_path / "np"))
    server: S3 = request.getfixturevalue("s3_server")
    return open_store(s3_settings(server, server.create_bucket()))


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of several parts. The last part has another size."""
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(37 * MIB + 11))
    return path


def keys(store: ObjectStore, prefix: str = "") -> set[str]:
    return {info.key for info in store.list(prefix)}


def hashes(data: bytes) -> list[str]:
    return [sha256(data[begin : begin + PART]) for begin in range(0, len(data), PART)]


def upload_parts(store: ObjectStore, key: str, upload_id: str, data: bytes, numbers: set[int] | None = None) -> None:
    for number, begin in enumerate(range(0, len(data), PART), start=1):
        piece = data[begin : begin + PART]
        if numbers is not None and number not in numbers:
            continue
        request = store.presign_part(key, upload_id, number, size=len(piece), sha256=sha256(piece))
        if request is None:
            store.receive_part(key, upload_id, number, [piece], size=len(piece), sha256=sha256(piece))
        else:
            httpx.put(request.url, content=piece, headers=request.headers, timeout=30).raise_for_status()


@pytest.mark.slow
def test_a_file_comes_back_as_it_went_in(store: ObjectStore, big: Path, tmp_path: Path) -> None:
    digest, sent, received = sha256(big.read_bytes()), [], []
    store.put_file("models/m/model.safetensors", big, sha256=digest, on_bytes=sent.append)
    target = tmp_path / "deep" / "copy.bin"
    store.get_file("models/m/model.safetensors", target, sha256=digest, on_bytes=received.append)
    assert target.read_bytes() == big.read_bytes()
    assert sum(sent) == sum(received) == big.stat().st_size
    info = store.stat("models/m/model.safetensors")
    assert info is not None
    assert info.size == big.stat().st_size


def test_an_empty_file_is_a_file(store: ObjectStore, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    store.put_file("jobs/j/empty", empty, sha256=sha256(b""))
    store.get_file("jobs/j/empty", tmp_path / "back", sha256=sha256(b""))
    assert (tmp_path / "back").read_bytes() == b""
    assert list(store.read("jobs/j/empty")) == []


@pytest.mark.slow
def test_ranges_are_half_open(store: ObjectStore, big: Path) -> None:
    data = big.read_bytes()
    store.put_file("k", big)
    for start, end in [(0, 1), (5, 17), (16 * MIB - 3, 16 * MIB + 3), (len(data) - 7, None), (0, None), (9, 9)]:
        assert b"".join(store.read("k", start, end)) == data[start:end], (start, end)
    assert b"".join(store.read("k", len(data) - 2, len(data) + 100)) == data[-2:]


@pytest.mark.parametrize("size", [100, 20 * MIB])
def test_a_file_that_is_not_what_was_announced_is_not_stored(store: ObjectStore, tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(size))
    with pytest.raises(NightpressError) as error:
        store.put_file("k", path, sha256="0" * 64)
    assert error.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert store.stat("k") is None
    assert keys(store) == set()


def test_a_damaged_object_leaves_no_file(store: ObjectStore, tmp_path: Path) -> None:
    store.put_bytes("k", b"not what the manifest says")
    with pytest.raises(NightpressError) as error:
        store.get_file("k", tmp_path / "out" / "f", sha256="0" * 64)
    assert error.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_object_is_not_found(store: ObjectStore, tmp_path: Path) -> None:
    assert store.stat("no/such") is None
    for attempt in (lambda: list(store.read("no/such")), lambda: store.get_file("no/such", tmp_path / "f")):
        with pytest.raises(NightpressError) as error:
            attempt()
        assert error.value.code is ErrorCode.NOT_FOUND
    assert store.delete_prefix("no/such") == 0


def test_a_prefix_is_a_folder_never_half_a_name(store: ObjectStore) -> None:
    for key in ("jobs/j1/attempts/1/a", "jobs/j1/attempts/1/b/c", "jobs/j1/attempts/10/a", "jobs/j1/attempts/2"):
        store.put_bytes(key, key.encode())
    assert keys(store, "jobs/j1/attempts/1") == {"jobs/j1/attempts/1/a", "jobs/j1/attempts/1/b/c"}
    assert store.delete_prefix("jobs/j1/attempts/1/") == 2
    assert keys(store) == {"jobs/j1/attempts/10/a", "jobs/j1/attempts/2"}
    assert store.delete_prefix("jobs/j1/attempts/2") == 1
    assert store.delete_prefix("jobs") == 1
    assert keys(store) == set()


@pytest.mark.parametrize(
    "key",
    ["../x", "a/../../x", "/etc/passwd", "", "a//b", "a/./b", "a\\b", "a\0b", "a\nb", "x" * 2000, ".np-uploads/u"],
)
def test_a_key_never_leaves_the_store(store: ObjectStore, tmp_path: Path, key: str) -> None:
    source = tmp_path / "f"
    source.write_bytes(b"x")
    attempts = (
        lambda: store.put_bytes(key, b"x"),
        lambda: store.put_file(key, source),
        lambda: store.get_file(key, tmp_path / "g"),
        lambda: list(store.read(key)),
        lambda: store.delete_prefix(key),
        lambda: store.stat(key),
        lambda: store.begin_upload(key, sha256="0" * 64, signed_parts=True),
    )
    for attempt in attempts:
        with pytest.raises(NightpressError) as error:
            attempt()
        assert error.value.code is ErrorCode.INVALID_REQUEST


def test_an_object_is_not_changed_through_the_file_it_came_from(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"first")
    store.put_file("k", path)
    path.write_bytes(b"second")
    store.get_file("k", tmp_path / "copy")
    (tmp_path / "copy").write_bytes(b"third")
    assert b"".join(store.read("k")) == b"first"


@pytest.mark.slow
def test_a_client_uploads_in_parts_and_resumes(store: ObjectStore) -> None:
    data = os.urandom(2 * PART + 100)
    upload = store.begin_upload("models/m/w", sha256=sha256(data), signed_parts=True)
    upload_parts(store, "models/m/w", upload, data, {1, 3})
    assert store.received_parts("models/m/w", upload) == {1: PART, 3: 100}
    assert store.stat("models/m/w") is None
    assert keys(store) == set()
    upload_parts(store, "models/m/w", upload, data, {2})
    store.complete_upload("models/m/w", upload, size=len(data), sha256=sha256(data), part_sha256=hashes(data))
    assert b"".join(store.read("models/m/w")) == data
    # Again, as if the first answer had been lost.
    store.complete_upload("models/m/w", upload, size=len(data), sha256=sha256(data), part_sha256=hashes(data))
    assert store.received_parts("models/m/w", upload) == {}


def test_an_upload_of_other_bytes_leaves_nothing(store: ObjectStore) -> None:
    data = os.urandom(PART + 5)
    upload = store.begin_upload("models/m/w", sha256="1" * 64, signed_parts=True)
    upload_parts(store, "models/m/w", upload, data)
    with pytest.raises(NightpressError) as error:
        store.complete_upload("models/m/w", upload, size=len(data), sha256="1" * 64, part_sha256=hashes(data))
    assert error.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert store.stat("models/m/w") is None
    assert store.received_parts("models/m/w", upload) == {}


def test_an_aborted_upload_leaves_nothing_and_takes_nothing_more(store: ObjectStore) -> None:
    upload = store.begin_upload("models/m/w", sha256=sha256(b"abc"), signed_parts=True)
    upload_parts(store, "models/m/w", upload, b"abc")
    store.abort_upload("models/m/w", upload)
    assert store.received_parts("models/m/w", upload) == {}
    with pytest.raises((NightpressError, httpx.HTTPStatusError)):
        upload_parts(store, "models/m/w", upload, b"abc")
    with pytest.raises(NightpressError) as error:
        store.complete_upload("models/m/w", upload, size=3, sha256=sha256(b"abc"), part_sha256=hashes(b"abc"))
    assert error.value.code is ErrorCode.NOT_FOUND


def test_sweeping_spares_finished_objects_and_fresh_uploads(store: ObjectStore) -> None:
    done = store.begin_upload("models/m/done", sha256=sha256(b"abc"), signed_parts=True)
    upload_parts(store, "models/m/done", done, b"abc")
    store.complete_upload("models/m/done", done, size=3, sha256=sha256(b"abc"), part_sha256=hashes(b"abc"))
    # A second upload of the same key was begun and abandoned. Removing it must not remove the object.
    again = store.begin_upload("models/m/done", sha256=sha256(b"abc"), signed_parts=True)
    upload_parts(store, "models/m/done", again, b"abc")
    half = store.begin_upload("models/m/half", sha256=sha256(b"abc"), signed_parts=True)
    upload_parts(store, "models/m/half", half, b"abc")
    assert store.sweep_uploads(older_than_s=3600) == 0
    assert store.received_parts("models/m/half", half) == {1: 3}
    assert store.sweep_uploads(older_than_s=-5) >= 1
    assert store.received_parts("models/m/half", half) == {}
    assert b"".join(store.read("models/m/done")) == b"abc"


def test_a_store_says_whether_it_works(store: ObjectStore) -> None:
    store.check()
    assert keys(store) == set()


# Features of one kind of store only ----------------------------------------------------------------------------------


def test_a_presigned_download_names_the_file(s3_server: S3) -> None:
    store = open_store(s3_settings(s3_server, s3_server.create_bucket()))
    store.put_bytes("jobs/j/out.bin", b"pressed")
    url = store.presign_get("jobs/j/out.bin", filename="höhe.bin")
    assert url is not None
    answer = httpx.get(url)
    assert answer.content == b"pressed"
    assert "h%C3%B6he.bin" in answer.headers["content-disposition"]


def test_presigned_urls_name_the_address_that_clients_know(s3_server: S3) -> None:
    settings = s3_settings(s3_server, s3_server.create_bucket(), s3_public_endpoint_url="https://objects.example")
    url = open_store(settings).presign_get("k", filename="k")
    assert url is not None
    assert url.startswith("https://objects.example/")


@pytest.mark.slow
def test_a_checksum_is_kept_beside_the_object(s3_server: S3, big: Path) -> None:
    bucket = s3_server.create_bucket()
    store = open_store(s3_settings(s3_server, bucket))
    store.put_file("small", Path(__file__), sha256=sha256(Path(__file__).read_bytes()))
    store.put_file("big", big, sha256=sha256(big.read_bytes()))
    for key, path in (("small", Path(__file__)), ("big", big)):
        head = s3_server.client().head_object(Bucket=bucket, Key=f"press/{key}")
        assert head["Metadata"]["sha256"] == sha256(path.read_bytes())


def test_a_server_that_is_away_is_storage_unavailable(tmp_path: Path) -> None:
    settings = Settings(
        _env_file=None,
        storage_url="s3://bucket",
        s3_endpoint_url="http://127.0.0.1:9",
        s3_access_key_id=SecretStr("a"),
        s3_secret_access_key=SecretStr("b"),
    )
    store = open_store(settings)
    with pytest.raises(NightpressError) as error:
        store.put_bytes("k", b"x")
    assert error.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert error.value.hint


def test_wrong_keys_are_storage_unavailable(s3_server: S3) -> None:
    settings = s3_settings(s3_server, s3_server.create_bucket())
    store = open_store(settings.model_copy(update={"s3_secret_access_key": SecretStr("wrong")}))
    with pytest.raises(NightpressError) as error:
        store.check()
    assert error.value.code is ErrorCode.STORAGE_UNAVAILABLE


@pytest.mark.slow
def test_a_failed_upload_leaves_no_parts_behind(s3_server: S3, big: Path) -> None:
    bucket = s3_server.create_bucket()
    store = open_store(s3_settings(s3_server, bucket))
    with pytest.raises(NightpressError):
        store.put_file("k", big, sha256="0" * 64)
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=bucket)


def test_a_write_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    upload = store.begin_upload("k", sha256="0" * 64, signed_parts=True)

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionResetError("the client went away")

    with pytest.raises(NightpressError):
        store.receive_part("k", upload, 1, broken(), size=8, sha256=None)
    assert store.received_parts("k", upload) == {}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"12345", ErrorCode.PAYLOAD_TOO_LARGE),
        (b"123", ErrorCode.INVALID_REQUEST),
        (b"1235", ErrorCode.CHECKSUM_MISMATCH),
    ],
)
def test_a_part_has_exactly_its_bytes(tmp_path: Path, sent: bytes, code: ErrorCode) -> None:
    store = LocalStore(tmp_path)
    upload = store.begin_upload("k", sha256="0" * 64, signed_parts=True)
    with pytest.raises(NightpressError) as error:
        store.receive_part("k", upload, 1, [sent], size=4, sha256=sha256(b"1234"))
    assert error.value.code is code
    assert store.received_parts("k", upload) == {}


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """Limit every file to 1 MiB, so that writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, big: Path, small_files_only: None, s3_server: S3
) -> None:
    store, away = LocalStore(tmp_path / "store"), open_store(s3_settings(s3_server, "ready"))
    upload = store.begin_upload("up", sha256="0" * 64, signed_parts=True)
    away.put_bytes("full-disk", b"x" * 3 * MIB)
    attempts = (
        lambda: store.put_file("k", big),
        lambda: store.put_bytes("k", b"x" * 2 * MIB),
        lambda: store.receive_part("up", upload, 1, [b"x" * MIB] * 3, size=3 * MIB, sha256=None),
        lambda: away.get_file("full-disk", tmp_path / "fetched"),
    )
    for attempt in attempts:
        with pytest.raises(NightpressError) as error:
            attempt()
        assert error.value.code is ErrorCode.DISK_FULL
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [big]


def test_s3_refuses_parts_on_a_local_road(s3_server: S3) -> None:
    store = open_store(s3_settings(s3_server, s3_server.create_bucket()))
    assert isinstance(store, S3Store)
    with pytest.raises(NightpressError) as error:
        store.receive_part("k", "u", 1, [b"x"], size=1, sha256=None)
    assert error.value.code is ErrorCode.CONFLICT


@pytest.mark.slow
def test_what_comes_in_pieces_is_stored_whole_or_not_at_all(store: ObjectStore):
    data = os.urandom(37 * MIB + 11)

    def pieces() -> Iterator[bytes]:
        for begin in range(0, len(data), 3 * MIB + 7):
            yield data[begin : begin + 3 * MIB + 7]

    assert store.put_pieces("a/big", pieces(), size=len(data)) == sha256(data)
    assert b"".join(store.read("a/big")) == data
    assert store.put_pieces("a/small", [b"x", b"yz"], size=3, sha256=sha256(b"xyz")) == sha256(b"xyz")
    assert b"".join(store.read("a/small")) == b"xyz"
    for size in (len(data) - 1, len(data) + 1):
        with pytest.raises(NightpressError):
            store.put_pieces("b/big", pieces(), size=size)
    for key, parts, size in (("b/big", pieces(), len(data)), ("b/small", [b"xyz"], 3)):
        with pytest.raises(NightpressError) as refused:
            store.put_pieces(key, parts, size=size, sha256=sha256(b"other"))
        assert refused.value.code is ErrorCode.CHECKSUM_MISMATCH

    def breaking() -> Iterator[bytes]:
        yield data[: 20 * MIB]
        raise NightpressError(ErrorCode.SOURCE_UNAVAILABLE, "away")

    with pytest.raises(NightpressError):
        store.put_pieces("b/broken", breaking(), size=len(data))
    assert keys(store) == {"a/big", "a/small"}
