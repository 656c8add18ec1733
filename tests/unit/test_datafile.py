"""The reader of data sets: a job reads, row by row, what registration accepts, and hostile input costs little."""

import csv
import gzip
import io
import json
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.core.compress.data.rows import Row, read_rows
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.datafile import DataFacts, examine_data, read_data
from nightpress.core.recipes.textfile import MAX_LINE, READ_LINES, Window
from tests.patience import slowness

_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "row",
    [
        b'{"text_a": "a", "text_b": "b", "score": 0.5}',
        b'{"sentence1": "a", "sentence2": "b", "label": 3.8}',
        b'{"query": "a", "positive": ["b"]}',
        b'{"tokens": ["a"], "tags": ["O"]}',
        b'{"prompt": "a", "choices": ["b", "c"], "answer": 1}',
    ],
)
def test_rows_of_every_metric_are_taken(row: bytes):
    assert examine_data("rows.jsonl", [row + b"\n" + row]) == DataFacts(2, 0)


def test_rows_that_no_metric_reads_are_refused():
    with pytest.raises(NightpressError, match="line 1"):
        examine_data("rows.jsonl", [b'{"colour": "red"}'])


# Registration and jobs -------------------------------------------------------------------------------------------------

TAKEN: dict[str, tuple[str, bytes, list[Row]]] = {
    "U+2028 in JSONL": ("a.jsonl", '{"text": "a\u2028b\u0085c"}\n{"text": "d"}'.encode(), [Row("a\u2028b\u0085c"), Row("d")]),
    "prose that begins with a brace": ("a.txt", b"{first} of all\n\n{second}\n", [Row("{first} of all"), Row("{second}")]),
    "prose that is JSON": ("a.txt", b'{"text": "x"}', [Row('{"text": "x"}')]),
    "prose that begins as Parquet": ("a.txt", b"PAR1 is a plane", [Row("PAR1 is a plane")]),
    "prose with old line ends": ("a.txt", b"a\rb\r\rc\r\n\r\n\r\nd\r\n", [Row("a\nb"), Row("c"), Row("d")]),
    "a byte-order mark in prose": ("a.txt", b"\xef\xbb\xbfa", [Row("a")]),
    "a byte-order mark in JSONL": ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}', [Row("a")]),
    "a byte-order mark in CSV": ("a.csv", b"\xef\xbb\xbftext,label\na,1\n", [Row("a", 1)]),
    "line ends of Windows in JSONL": ("a.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', [Row("a"), Row("b")]),
    "line ends of Windows in CSV": ("a.csv", b'text,label\r\n"a\r\nb",1\r\n', [Row("a\nb", 1)]),
    "line ends of old Macs in CSV": ("a.csv", b'text\r"a\rb"\r', [Row("a\nb")]),
    "class names in JSONL": (
        "a.jsonl",
        b'{"text": "a", "label": "pos"}\n{"text": "b", "label": " neg "}',
        [Row("a", "pos"), Row("b", "neg")],
    ),
    "class names in CSV": ("a.csv", b"text,label\na,pos\nb,neg\n", [Row("a", "pos"), Row("b", "neg")]),
    "a class's number as text": ("a.jsonl", b'{"text": "a", "label": "3"}', [Row("a", 3)]),
    "a number to be predicted": (
        "a.jsonl",
        b'{"text": "a", "label": 1.5}\n{"text": "b", "label": -2}\n{"text": "c", "label": 3.0}',
        [Row("a", 1.5), Row("b", -2.0), Row("c", 3)],
    ),
    "a number to be predicted in CSV": ("a.csv", b"text,label\na,-0.25\nb,4.0\n", [Row("a", -0.25), Row("b", 4)]),
    "several labels a row": (
        "a.jsonl",
        b'{"text": "a", "label": ["joy", " fear "]}\n{"text": "b", "label": []}\n{"text": "c", "label": [0, 1.0]}',
        [Row("a", ("joy", "fear")), Row("b", ()), Row("c", (0, 1))],
    ),
    "yes and no": ("a.jsonl", b'{"text": "a", "label": true}\n{"text": "b", "label": false}', [Row("a", 1), Row("b", 0)]),
    "superscript as a class's name": ("a.csv", "text,label\na,²\n".encode(), [Row("a", "²")]),
    "digits that are not ASCII": ("a.csv", "text,label\na,٣\n".encode(), [Row("a", "٣")]),
    "a label that is null": ("a.jsonl", b'{"text": "a", "label": null}', [Row("a")]),
    "blank rows in JSONL": ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": " ", "label": 1}\n', [Row("a", 0)]),
    "blank rows in CSV": ("a.csv", b"text,label\na,0\n,\n  ,1\n\n", [Row("a", 0)]),
    "a text that is null": ("a.jsonl", b'{"text": null}\n{"text": "a"}', [Row("a")]),
    "a turn that says nothing": (
        "a.jsonl",
        b'{"messages": [{"role": "u", "content": "a"}, {"role": "t", "content": null}]}\n{"messages": [{"role": "u", "content": null}]}',
        [Row("<u>a<t>")],
    ),
    "escapes of whole characters": ("a.jsonl", rb'{"text": "\ud83d\ude42 \\u0000"}', [Row("🙂 \\u0000")]),
    "a short row of CSV": ("a.csv", b"label,text\n1,a\n0\n", [Row("a", 1)]),
    "packed twice, one after the other": (
        "a.txt.gz",
        gzip.compress(b"a\n\n", mtime=0) + gzip.compress(b"b", mtime=0) + bytes(100),
        [Row("a"), Row("b")],
    ),
}  # fmt: skip


def job_rows(folder: Path, name: str, data: bytes) -> list[Row]:
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    (folder / name).write_bytes(data)
    return read_rows("d", folder / name, model_dir=folder)


@pytest.mark.parametrize("what", TAKEN)
def test_what_registration_takes_a_job_reads(what: str, tmp_path: Path):
    name, data, rows = TAKEN[what]
    lines = [line for row in rows for line in row.text.split("\n")]
    assert examine_data(name, [data]).rows == len(lines if ".txt" in name else rows)
    assert job_rows(tmp_path, name, data) == rows


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "a", "label": {"x": 1}}', "line 1: `label`"),
        ("a.jsonl", b'{"text": "a", "label": NaN}', "line 1: `label`"),
        ("a.jsonl", b'{"text": "a", "label": ["x", null]}', "line 1: `label`"),
        ("a.jsonl", b'{"text": "a", "label": [["x"]]}', "line 1: `label`"),
        ("a.jsonl", b'{"text": "a", "label": 100000}', "line 1: `label`"),
        ("a.csv", b"text,label\na," + b"9" * 5000, "line 2: `label`"),
        ("a.jsonl", b'{"text": ["a"]}', "line 1 has a `text` that is no text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 has characters that are no text"),
        ("a.jsonl", b'{"text": "a\\u0000"}', "line 1 has characters that are no text"),
        ("a.jsonl", b'\n{"text": "a"} x', "line 2 is not JSON"),
        ("a.jsonl", b'{"messages": [{"role": "u"}]}', "line 1: `messages`"),
        ("a.jsonl", b'{"messages": [{"role": "u", "content": [{"type": "text"}]}]}', "line 1: `messages`"),
        ("a.jsonl", b'{"messages": "hello"}', "line 1: `messages`"),
        ("a.csv", b'text\n"a" b\n', "its CSV can't be read at line 2"),
        ("a.csv", b'text\n"a\n', "its CSV can't be read"),
        ("a.txt", "a".encode("utf-16"), "UTF-8"),
        ("a.txt.gz", b"\x1f\x8b\x08\xff" + b"x" * 50, "gzip"),
        ("a.txt.gz", gzip.compress(b"hello\n", mtime=0) + b"garbage", "gzip"),
        ("a.txt.gz", gzip.compress(b"hello\n", mtime=0)[:-1], "gzip"),
    ],
)
def test_what_registration_refuses_a_job_refuses_in_the_same_words(name: str, data: bytes, says: str, tmp_path: Path):
    with pytest.raises(NightpressError) as registered:
        examine_data(name, [data])
    with pytest.raises(NightpressError) as read:
        job_rows(tmp_path, name, data)
    assert says in registered.value.message
    assert registered.value.code is read.value.code is ErrorCode.INVALID_DATA
    assert registered.value.message.replace(name, "d") == read.value.message
    assert registered.value.hint == read.value.hint != ""


def test_labels_are_counted_by_number_or_by_name():
    assert examine_data("a.jsonl", [b'{"text": "a", "label": 4}']).labels == 5
    assert examine_data("a.csv", [b"text,label\na,x\nb,y\nc,x\n"]).labels == 2
    assert examine_data("a.jsonl", [b'{"text": "a", "label": ["x", "y"]}\n{"text": "b", "label": ["z"]}']).labels == 3
    assert examine_data("a.jsonl", [b'{"text": "a", "label": 0.5}']).labels == 1
    with pytest.raises(NightpressError, match="line 3 has no label"):
        examine_data("a.csv", [b"text,label\na,x\nb,\n"])


@given(data=st.binary(max_size=80), kind=st.sampled_from(["txt", "jsonl", "csv"]), cuts=st.lists(st.integers(0, 80)))
def test_how_the_bytes_come_in_changes_nothing(data: bytes, kind: str, cuts: list[int]):
    at = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[begin:end] for begin, end in pairwise(at)]

    def rows(pieces: list[bytes]) -> object:
        try:
            return list(read_data("d", f"a.{kind}", pieces))
        except NightpressError as error:
            return error.message.split(" near byte")[0]

    assert rows(pieces) == rows([data])


@pytest.mark.slow
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20), max_size=5))
def test_rows_that_any_program_writes_come_back(texts: list[str]):
    wanted = [text for text in texts if text.strip()]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["text"], *([text] for text in texts)])
    for name, data in (("a.jsonl", lines), ("a.csv", table.getvalue())):
        assert [row.text for row in read_data("d", name, [data.encode()])] == wanted


# The cost of hostile input -----------------------------------------------------------------------------------------------


def _empty_members(count: int) -> bytes:
    return gzip.compress(b"", mtime=0) * count


def _empty_blocks(count: int) -> bytes:
    """A gzip file that unpacks to nothing: stored blocks of no bytes."""
    return gzip.compress(b"", mtime=0)[:10] + b"\0\0\0\xff\xff" * count


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "line ends, packed": ("a.txt.gz", lambda: gzip.compress(b"\n" * 70_000_000, 1, mtime=0)),
    "line ends of rows, packed": ("a.jsonl.gz", lambda: gzip.compress(b"\n" * 70_000_000, 1, mtime=0)),
    "line ends of a table, packed": ("a.csv.gz", lambda: gzip.compress(b"text\n" + b"\n" * 40_000_000, 1, mtime=0)),
    "one letter, packed": ("a.txt.gz", lambda: gzip.compress(b"a" * 70_000_000, 1, mtime=0)),
    "one row, packed": ("a.jsonl.gz", lambda: gzip.compress(b'{"text": "' + b"a" * 100_000_000, 1, mtime=0)),
    "empty members": ("a.txt.gz", lambda: _empty_members(500_000)),
    "empty blocks": ("a.txt.gz", lambda: _empty_blocks(4_000_000)),
    "packed twice": ("a.txt.gz", lambda: gzip.compress(gzip.compress(b"a" * 100_000_000, 1), mtime=0)),
    "a quote without end": ("a.csv", lambda: b'text\n"' + b"a,\n" * 2_000_000),
    "a row of commas": ("a.csv", lambda: b"text\n" + b"," * 20_000_000),
    "a row of quoted line ends": ("a.csv", lambda: b"text\n" + b'"a\n",' * 2_000_000),
    "a header of commas": ("a.csv", lambda: b"," * 20_000_000),
    "a million empty lists": ("a.jsonl", lambda: b'{"x": [' + b"[]," * 300_000 + b"[]]}\n"),
    "a row without end": ("a.jsonl", lambda: b"[" * 20_000_000),
    "a deep row": ("a.jsonl", lambda: b"[" * 900_000 + b"\n"),
    "a long number": ("a.jsonl", lambda: b'{"text":"a","label":' + b"9" * 900_000 + b"}\n"),
    "half surrogates": ("a.jsonl", lambda: b'{"text": "' + b"\\ud800" * 150_000 + b'"}'),
    "spaces": ("a.txt", lambda: b" " * 20_000_000),
    "zeros": ("a.txt", lambda: bytes(20_000_000)),
    "a footer that lies": ("a.parquet", lambda: b"PAR1" + b"\xff\xff\xff\x7fPAR1"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.slow
def test_what_is_refused_costs_less_than_a_second_and_64_mb(bomb: str):
    name, make = BOMBS[bomb]
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(NightpressError) as caught:
            examine_data(name, [data])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    began = time.thread_time()
    with pytest.raises(NightpressError):
        examine_data(name, [data])
    assert time.thread_time() - began < slowness()
    assert peak < 64 * 1024**2
    assert caught.value.kind.status in {413, 422}


def test_only_the_first_lines_of_a_long_file_are_read():
    window = Window(lines=3)
    data = b'{"text": "a"}\n' * 3 + b"no JSON\n"
    assert len(list(read_data("d", "a.jsonl", [data], window))) == 3
    assert window.cut == "lines"
    assert window.hides
    window = Window(lines=4)
    with pytest.raises(NightpressError, match="line 4"):
        list(read_data("d", "a.jsonl", [data], window))
    assert not window.hides


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_row_that_the_window_cuts_is_left_out(name: str):
    data = {"a.jsonl": b'{"text": "a"}\n{"text": "bbbb"}\n', "a.csv": b'text\na\n"bbbb"\n', "a.txt": b"a\n\nbbbb"}[name]
    window = Window(size=len(data) - 3)
    assert [row.text for row in read_data("d", name, [data], window)] == ["a"]
    assert window.cut == "size"


@pytest.mark.slow
def test_a_million_lines_are_read_in_seconds():
    rows = b'{"text":"a"}\n' * (READ_LINES + 10)
    began = time.thread_time()
    assert examine_data("a.jsonl", [rows]).rows == READ_LINES
    assert time.thread_time() - began < 15.0


def test_long_paragraphs_are_cut():
    lengths = [len(row.text or "") for row in read_data("d", "a.txt", [b"x" * (2 * MAX_LINE + 5)])]
    assert lengths == [MAX_LINE, MAX_LINE, 5]
