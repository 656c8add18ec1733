"""F41: bombs uploaded as models or data are refused within seconds, or accepted without unpacking. The API answers meanwhile."""

import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from nightpress.client.errors import ClientError
from nightpress.core.handoff.manifest import describe_folder
from tests.face import Face
from tests.patience import slowness


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    face = Face(tmp_path_factory.mktemp("face"))
    face.start()
    yield face
    face.close()


def gguf(folder: Path) -> None:
    """A header that announces 2^60 tensors and keys."""
    (folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(64))


def onnx(folder: Path) -> None:
    """Nested graphs, each of which claims to be as long as the file."""
    (folder / "model.onnx").write_bytes(b"\x08\x07" + b"\x3a\xff\xff\xff\xff\x07" * 100_000)


def image(folder: Path) -> None:
    """An image of ten gigapixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000), 9)
    (folder / "image.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("disguised", [False, True], ids=["by its name", "as safetensors"])
@pytest.mark.parametrize("bomb", [gguf, onnx, image])
def test_f41_a_bomb_brought_as_a_model_costs_nothing(
    face: Face, bert_tiny: Path, tmp_path: Path, bomb: Callable[[Path], None], disguised: bool
) -> None:
    """The bomb is sent over plain HTTP: our own client would refuse it before sending anything."""
    bomb(tmp_path)
    [path] = [path for path in tmp_path.iterdir() if path.is_file()]
    if disguised:
        path = path.rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((bert_tiny / "config.json").read_bytes())

    def bring() -> str:
        headers = {"Authorization": f"Bearer {face.key}"}
        with httpx.Client(base_url=face.url, headers=headers, trust_env=False, timeout=60) as client:
            files = [file.model_dump() for file in describe_folder(tmp_path)]
            made = client.post("/v1/models", json={"name": f"bomb-{bomb.__name__}", "files": files})
            if made.status_code == 422:
                return f"refused: {made.text}"
            assert made.status_code == 201, made.text
            for file in made.json()["uploads"]:
                for part in file["parts"]:
                    content = (tmp_path / file["path"]).read_bytes()
                    assert client.put(part["url"], content=content, headers=part["headers"]).is_success
            done = client.post(f"/v1/models/{made.json()['id']}/complete")
            return f"refused: {done.text}" if done.status_code == 422 else f"{done.status_code} {done.text}"

    assert_cheap(face, bring, taken=False)


def test_f41_a_parquet_bomb_brought_as_data_costs_nothing(face: Face, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), ["x" * 10_000_000])
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": text}), path, compression="zstd")

    def bring() -> str:
        with face.client() as client:
            return client.data_sets.wait(client.data_sets.upload(path, "bomb").id).state

    assert_cheap(face, bring, taken=True)


def assert_cheap(face: Face, bring: Callable[[], str], *, taken: bool) -> None:
    """Check that the upload ends within 10 s and that other requests wait less than 1 s.

    The bomb must be refused, unless `taken`: then it may also become a data set, because nothing unpacks it.
    """
    stop, asking, slowest = threading.Event(), threading.Event(), [0.0]

    def ask() -> None:
        headers = {"Authorization": f"Bearer {face.key}"}
        with httpx.Client(base_url=face.url, headers=headers, trust_env=False, timeout=60) as client:
            while not stop.wait(0.05):
                asking.set()
                began = time.monotonic()
                assert client.get("/v1/me").status_code == 200
                slowest[0] = max(slowest[0], time.monotonic() - began)

    asker = threading.Thread(target=ask)
    asker.start()
    assert asking.wait(20 * slowness())
    began = time.monotonic()
    try:
        state = bring()
    except ClientError as error:
        state = f"refused: {error}"
    took = time.monotonic() - began
    stop.set()
    asker.join()
    assert state.startswith("refused") or (taken and state in {"ready", "failed"}), state
    assert took < 10 * slowness()
    assert 0 < slowest[0] < 1 * slowness()
