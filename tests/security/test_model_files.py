"""S1, S2: hostile model files are refused quickly and cheaply, and nothing in them runs."""

import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.patience import slowness
from tests.service import MIB
from tests.tiny_model import refused, write_safetensors

# S1 ------------------------------------------------------------------------------------------------------------------


class _Bomb:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def _zipped(payload: bytes) -> bytes:
    """The payload in a zip file like that of torch.save, with the flag bit for encryption: some scanners skip such files."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    raw = bytearray(packed.getvalue())
    raw[6] |= 1
    return bytes(raw)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pkl", "config.p", "model.safetensors", "config.json"]
)
@pytest.mark.parametrize("form", ["protocol 4", "protocol 0", "zip"])
def test_a_pickle_is_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str) -> None:
    sentinel = folder.parent / "ran"
    protocol = 0 if form == "protocol 0" else 4
    payload = pickle.dumps(_Bomb(sentinel), protocol=protocol)
    (folder / name).write_bytes(_zipped(payload) if form == "zip" else payload)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for function in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, function, forbidden)
    if name not in {"model.safetensors", "config.json"}:
        inspect_model(_Watched(folder))
        assert FolderFiles(folder).selection().left_out == (name,)
        (folder / "model.safetensors").unlink()
        assert "nightpress convert" in refused(folder, ErrorCode.UNSUPPORTED_FORMAT).hint
    else:
        assert refused(folder, ErrorCode.UNSUPPORTED_FORMAT, ErrorCode.MALFORMED_MODEL).details["file"] == name
    assert not sentinel.exists()


class _Watched(FolderFiles):
    """Fails if a file is opened that is no part of a model."""

    def open(self, name: str) -> BufferedReader:
        assert name in {"config.json", "model.safetensors", "tokenizer.json"}
        return super().open(name)


# S2 ------------------------------------------------------------------------------------------------------------------

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _many(count: int, data: int, *, escaped: bool = False) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        key = r"data_offset\u0073" if escaped else "data_offsets"
        entries = (f'"t{n}":{{"dtype":"U8","shape":[0],"{key}":[0,0]}}' for n in range(count))
        write_safetensors(root, ("{" + ",".join(entries) + "}").encode(), data=data)

    return write


def _header(header: object, *, data: int = 8, length: int | None = None) -> Callable[[Path], None]:
    """header: of a file, or a function that makes a large one when its test runs."""
    return lambda root: write_safetensors(root, header() if callable(header) else header, data=data, length=length)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "a header of 2^63 bytes": _header(b"{}", length=2**63),
    "a header of 2^64-1 bytes": _header(b"{}", length=2**64 - 1),
    "a header longer than the file": _header({"a": TENSOR}, length=500_000),
    "a header of 120 MB": _header(lambda: b'{"a":' + b" " * 120 * MIB + b"}", data=4 * 1024 * MIB),
    "a header over 1 MB and over 5%": _header(lambda: b'{"a":' + b" " * 2 * MIB + b"}", data=10 * MIB),
    "spaces without end": _header(lambda: b'{"a":' + b" " * 40 * MIB + b"}", data=1024 * MIB),
    "a key twice": _header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ),
    "a key twice, once escaped": _header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ),
    "a field twice": _header(b'{"a":{"dtype":"F32","dtype":"I8","shape":[2],"data_offsets":[0,8]}}'),
    "offsets that overlap": _header({"a": TENSOR, "b": {**TENSOR, "data_offsets": [4, 12]}}, data=12),
    "the same bytes twice": _header({"a": TENSOR, "b": TENSOR}),
    "a hole between tensors": _header({"a": TENSOR, "b": {**TENSOR, "data_offsets": [16, 24]}}, data=24),
    "a hole at the start": _header({"a": {**TENSOR, "data_offsets": [8, 16]}}, data=16),
    "bytes after the last tensor": _header({"a": TENSOR}, data=100),
    "offsets past the end": _header({"a": {**TENSOR, "data_offsets": [0, 8]}}, data=4),
    "offsets backwards": _header({"a": {**TENSOR, "data_offsets": [8, 0]}}),
    "negative offsets": _header({"a": {**TENSOR, "data_offsets": [-8, 0]}}),
    "a shape that overflows 64 bits": _header({"a": {**TENSOR, "shape": [2**32, 2**32, 2**32]}}),
    "a shape that wraps to the right size": _header({"a": {**TENSOR, "shape": [2**63 + 1, 2]}}),
    "a negative dimension": _header({"a": {**TENSOR, "shape": [-1, -2]}}),
    "a dimension that is true": _header({"a": {**TENSOR, "shape": [True, 2]}}),
    "a dimension that is a float": _header({"a": {**TENSOR, "shape": [2.0]}}),
    "a number of a million digits": _header(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,8]}}'
    ),
    "a thousand dimensions": _header({"a": {**TENSOR, "shape": [1] * 1000 + [2]}}),
    "an unknown dtype": _header({"a": {**TENSOR, "dtype": "PICKLE"}}),
    "a dtype that is a list": _header({"a": {**TENSOR, "dtype": ["F32"]}}),
    "an extra field": _header({"a": {**TENSOR, "loader": "os.system"}}),
    "no offsets": _header({"a": {"dtype": "F32", "shape": [2]}}),
    "NaN": _header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "a million empty tensors": _many(1_000_000, 0),
    "a million empty tensors in a large file": _many(1_000_000, 2048 * MIB),
    "a hundred thousand and one, disguised": _many(100_001, 2048 * MIB, escaped=True),
    "50 MB of metadata": _header(lambda: {"__metadata__": {"x": "y" * 50 * MIB}, "a": TENSOR}, data=2048 * MIB),
    "50 MB of metadata keys": _header(
        lambda: {"__metadata__": {str(n): "" for n in range(3_000_000)}}, data=2048 * MIB
    ),
    "metadata that is no text": _header({"__metadata__": {"x": {"y": 1}}, "a": TENSOR}),
    "metadata twice": _header(
        b'{"__metadata__":{},"__metadata__":{},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "an array": _header(b"[]"),
    "nesting without end": _header(b'{"a":' + b"[" * 500_000 + b"}"),
    "something after the header": _header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} {}'),
    "no end": _header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'),
    "a comma too many": _header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}'),
    "a name that is no text": _header(b'{"\xff\xfe":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "a name with a NUL": _header({"a\0b": TENSOR}),
    "a name with half a surrogate pair": _header(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "a name of a megabyte": _header({"a" * MIB: TENSOR}),
    "an empty file": lambda root: (root / "model.safetensors").write_bytes(b"") and None,
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.slow
def test_a_hostile_header_is_refused_fast(folder: Path, attack: str) -> None:
    HOSTILE[attack](folder)
    start = time.thread_time()  # this thread's processor time: a busy machine must not fail the test
    error = refused(folder, ErrorCode.MALFORMED_MODEL)
    assert time.thread_time() - start < 1.0
    assert error.details["file"] == "model.safetensors"


_MEASURED = """
import resource, sys
from pathlib import Path
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    inspect_model(FolderFiles(Path(sys.argv[1])))
except NightpressError as error:
    assert error.code == "malformed_model", error
else:
    raise SystemExit("accepted")
print(peak() - before)
"""


def kib_to_refuse(folder: Path) -> int:
    """How many KiB a process takes to refuse the folder as malformed."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    "attack",
    [
        "a header of 120 MB",
        "spaces without end",
        "a million empty tensors in a large file",
        "a hundred thousand and one, disguised",
        "50 MB of metadata",
        "50 MB of metadata keys",
        "nesting without end",
    ],
)
@pytest.mark.slow
def test_a_hostile_header_costs_little_memory(folder: Path, attack: str) -> None:
    HOSTILE[attack](folder)
    assert kib_to_refuse(folder) < 64 * 1024


JSON_BOMBS: dict[str, Callable[[], bytes]] = {
    "empty lists": lambda: b"[" + b"[]," * 5_500_000 + b"[]]",
    "empty objects": lambda: b"[" + b"{}," * 5_500_000 + b"{}]",
    "numbers": lambda: b"[" + b"1.5," * 4_000_000 + b"1]",
    "just fewer lists than are too many": lambda: b"[" + b"[]," * 240_000 + b"[]]",
    "one letter": lambda: b'["' + b"a" * 16_000_000 + b'"]',
    "letters of two bytes": lambda: b'["' + "é".encode() * 8_000_000 + b'"]',
    "one letter of four bytes among many of one": lambda: b'["' + "🙂".encode() + b"a" * 15_000_000 + b'"]',
    "halves of surrogate pairs": lambda: b'["' + b"\\ud800" * 2_600_000 + b'"]',
    "depth": lambda: b"[" * 16_000_000,
    "a long number": lambda: b"[" + b"9" * 16_000_000 + b"]",
}


@pytest.mark.parametrize("bomb", JSON_BOMBS)
@pytest.mark.slow
def test_json_beside_a_model_costs_little(folder: Path, bomb: str) -> None:
    data = JSON_BOMBS[bomb]()
    for number in range(7):
        (folder / f"x{number}.json").write_bytes(data)
    start = time.thread_time()
    refused(folder, ErrorCode.MALFORMED_MODEL)
    assert time.thread_time() - start < slowness()
    assert kib_to_refuse(folder) < 64 * 1024


@pytest.mark.slow
def test_as_much_json_as_real_models_have_is_read(folder: Path) -> None:
    """A vocabulary with scores, as sentence-transformers stores it, and a tokenizer config with 20,000 added tokens."""
    (folder / "unigram.json").write_text(json.dumps([["▁word", -1.5]] * 250_000))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(n): {"content": f"<{n}>", "special": True} for n in range(20_000)}})
    )
    inspect_model(FolderFiles(folder))


@pytest.mark.slow
def test_a_folder_of_endless_files_is_refused(folder: Path) -> None:
    for number in range(2001):
        (folder / f"{number}.txt").touch()
    refused(folder, ErrorCode.MALFORMED_MODEL)


def test_a_link_to_a_folder_is_not_followed(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("secret")
    (folder / "sub").symlink_to(outside)
    assert FolderFiles(folder).selection().left_out == ("sub/",)
    (folder / "modules.json").write_text('[{"type": "Pooling", "path": "sub"}]')
    with pytest.raises(NightpressError, match="sub is a link to a folder"):
        FolderFiles(folder).names()


@pytest.mark.parametrize("kind", ["link to a file", "link up and back", "named pipe", "dangling link"])
def test_nothing_leads_out_of_a_folder(folder: Path, kind: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "vocab.txt").write_text("secret")
    path = folder / "vocab.txt"
    if kind == "link to a file":
        path.symlink_to(outside / "vocab.txt")
    elif kind == "link up and back":
        (outside / "back").symlink_to(folder)
        path.symlink_to(outside / "vocab.txt")
    elif kind == "named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / "nothing")
    with pytest.raises(NightpressError) as error:
        FolderFiles(folder).names()
    assert error.value.code is ErrorCode.PATH_NOT_ALLOWED
    with pytest.raises(NightpressError):
        FolderFiles(folder).read("../outside/vocab.txt", 0, 10)
