"""If our strict reader accepts a file, the library that loads it later reads the same."""

import json
import struct
from collections.abc import Mapping

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.safetensors import read_safetensors_header

WIDTHS = {"F32": 4, "BF16": 2, "I8": 1, "I64": 8}


#: a header of 0x80 bytes: the file begins with a pickle's first byte, but is no pickle
_HEADER = b'{"a":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}'.ljust(0x80)
PICKLE_LIKE = struct.pack("<Q", 0x80) + _HEADER + b"\0"


class OneFile:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def names(self) -> Mapping[str, int]:
        return {"f": len(self.data)}

    def read(self, _path: str, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


@st.composite
def files(draw: st.DrawFn) -> bytes:
    names = draw(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8),
            unique=True,
            max_size=5,
        )
    )
    header: dict[str, object] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
    at = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(WIDTHS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = WIDTHS[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + bytes(at)


def ours(data: bytes) -> dict[str, tuple[int, ...]] | None:
    try:
        return {tensor.name: tensor.shape for tensor in read_safetensors_header(OneFile(data), "f", len(data))}
    except NightpressError as error:
        if error.code is not ErrorCode.MALFORMED_MODEL:
            raise
        return None


def theirs(data: bytes) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor["shape"]) for name, tensor in deserialize(data)}


@given(files())
@example(PICKLE_LIKE)
@settings(max_examples=60)
@pytest.mark.slow
def test_every_valid_file_is_read_as_the_library_reads_it(data: bytes) -> None:
    assert ours(data) == theirs(data)


@given(files(), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), min_size=1, max_size=3))
@settings(max_examples=150)
@pytest.mark.slow
def test_what_is_accepted_of_damaged_files_the_library_accepts_too(
    data: bytes, damage: list[tuple[int, bytes]]
) -> None:
    for at, new in damage:
        at = at % len(data)
        data = data[:at] + new + data[at + max(1, len(new)) :]
    read = ours(data)
    if read is not None:
        assert read == theirs(data)
