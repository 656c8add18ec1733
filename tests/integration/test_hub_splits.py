"""Splits of data set repositories of the Hub: the needed columns of a split are fetched, and nothing else."""

import gzip
import io
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightpress.core.compress.data.rows import read_rows
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings
from nightpress.core.sources.address import HubAddress, SplitChoice, parse_address
from nightpress.core.sources.parquet import Projector
from nightpress.core.sources.splits import files_of_split
from nightpress.core.sources.thrift import read_struct, write_struct
from nightpress.core.wire.models import DataSetCreate, DataSetView
from tests.hub import Hub
from tests.registry import TENANT, World, refusal
from tests.service import eventually

TEXTS = [f"Line {number} of a text that somebody wrote." for number in range(400)]
LABELS = [number % 3 for number in range(400)]
HEAVY = random.Random(0).randbytes(400_000)


def parquet(columns: Mapping[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **{"row_group_size": 100, **options})
    return out.getvalue()


def heavy(count: int = 400) -> list[bytes]:
    return [HEAVY[at * 1000 : (at + 1) * 1000] for at in range(count)]


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, hub: Hub) -> Iterator[World]:
    world = World(tmp_path, sqlite_url, hub_endpoint=hub.url, hub_organisations=["acme"])
    yield world
    world.close()


def fetch(world: World, source: str) -> DataSetView:
    made = world.data_sets.create(TENANT, DataSetCreate(name="split", source=source))
    intake = world.intake()

    def over() -> DataSetView | None:
        intake.advance()
        found = world.data_sets.get(TENANT, made.id)
        return found if found.state in {"ready", "failed"} else None

    return eventually(over)


def stored(world: World, view: DataSetView, folder: Path) -> Path:
    """The data set's file, as a worker gets it."""
    assert view.state == "ready", view.error
    [key] = [info.key for info in world.objects.list(f"datasets/{view.id}/")]
    world.objects.get_file(key, folder / key.rpartition("/")[2])
    return folder / key.rpartition("/")[2]


def test_of_parquet_the_needed_columns_are_fetched_and_read_by_a_job(world: World, hub: Hub, tmp_path: Path) -> None:
    columns = {"id": list(range(400)), "image": heavy(), "sentence": TEXTS, "label": LABELS}
    files = {f"data/train-0000{part}-of-00002.parquet": parquet({name: values[part * 200 : part * 200 + 200] for name, values in columns.items()}) for part in range(2)}  # fmt: skip
    commit = hub.push("datasets/acme/texts", {**files, "data/test-00000-of-00001.parquet": parquet(columns), "README.md": b"# hi"}, branch="v1")  # fmt: skip
    view = fetch(world, "hf://datasets/acme/texts@v1?split=train&columns=text:sentence,label")
    assert (view.revision, view.source_url) == (commit, "hf://datasets/acme/texts@v1?split=train&columns=text:sentence,label")  # fmt: skip
    assert hub.sent < sum(map(len, files.values())) / 5
    file = stored(world, view, tmp_path)
    assert file.name == "train.parquet"
    assert pq.read_table(file).to_pydict() == {"text": TEXTS, "label": LABELS}
    assert [(row.text, row.label) for row in read_rows("split", file)] == list(zip(TEXTS, LABELS, strict=True))


@pytest.mark.slow
def test_nested_columns_dictionaries_and_nulls_stay_as_they_are(world: World, hub: Hub, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    columns = {
        "messages": [turns, None, turns[:1], []],
        "label": pa.array(["a", None, "b", "a"]).dictionary_encode(),
        "slice": ["x", "y", None, "x"],
        "tags": [["1", "2"], [], None, ["3"]],
    }
    for name, options in (("v1", {}), ("v2", {"compression": "zstd", "data_page_version": "2.0"}), ("plain", {"use_dictionary": False, "compression": "none", "write_page_index": True})):  # fmt: skip
        hub.push("datasets/acme/chats", {"default/train/0000.parquet": parquet(columns, **options)}, branch=name)
        file = stored(world, fetch(world, f"hf://datasets/acme/chats@{name}"), tmp_path)
        expected = {**columns, "label": ["a", None, "b", "a"]}
        assert pq.read_table(file).to_pydict() == {name: expected[name] for name in ("messages", "label", "slice")}


def test_a_download_that_breaks_goes_on_where_it_broke(world: World, hub: Hub, tmp_path: Path) -> None:
    hub.push("datasets/acme/texts", {"train.parquet": parquet({"text": TEXTS, "image": heavy()}, compression="none")})
    hub.breaks = [10**9, 500, 300]  # the list of files is whole
    file = stored(world, fetch(world, "hf://datasets/acme/texts"), tmp_path)
    assert pq.read_table(file).to_pydict() == {"text": TEXTS}


def test_as_much_is_fetched_as_a_job_reads(
    world: World, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightpress.core.sources.parquet.READ_LINES", 150)
    monkeypatch.setattr("nightpress.core.sources.split_source.READ_LINES", 150)
    hub.push("datasets/acme/texts", {f"train/{part}.parquet": parquet({"text": TEXTS}) for part in range(3)})
    file = stored(world, fetch(world, "hf://datasets/acme/texts"), tmp_path)
    assert pq.read_table(file).to_pydict() == {"text": TEXTS[:200]}  # whole row groups
    assert not any("/1.parquet" in path for path in hub.paths())
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    hub.push("datasets/acme/lines", {"train.jsonl": lines})
    file = stored(world, fetch(world, "hf://datasets/acme/lines"), tmp_path)
    assert file.read_bytes().count(b"\n") == 150


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz"])
def test_of_lines_the_chosen_columns_become_jsonl(world: World, hub: Hub, tmp_path: Path, kind: str) -> None:
    if kind.startswith("jsonl"):
        rows = [json.dumps({"sentence": text, "label": label, "noise": "x" * 50}) for text, label in zip(TEXTS, LABELS, strict=True)]  # fmt: skip
    else:
        rows = ["noise,sentence,label", *(f'"a ""b"", c","{text}",{label}' for text, label in zip(TEXTS, LABELS, strict=True))]  # fmt: skip
    data = "\r\n".join(rows).encode("utf-8-sig")
    hub.push("datasets/acme/lines", {f"validation.{kind}": gzip.compress(data) if kind.endswith("gz") else data})
    view = fetch(world, "hf://datasets/acme/lines?split=validation&columns=text:sentence,label")
    file = stored(world, view, tmp_path)
    assert (file.name, view.rows, view.labelled) == ("validation.jsonl", 400, True)
    assert [row.text for row in read_rows("split", file)] == TEXTS
    assert set(json.loads(file.read_bytes().split(b"\n")[0])) == {"text", "label"}


def test_text_stays_text(world: World, hub: Hub, tmp_path: Path) -> None:
    hub.push("datasets/acme/prose", {"a.txt": b"One.\r\nTwo.", "b.txt": b"Three.\n"})
    file = stored(world, fetch(world, "hf://datasets/acme/prose"), tmp_path)
    assert [row.text for row in read_rows("split", file)] == ["One.\nTwo.", "Three."]


README = """---
license: mit
configs:
- config_name: de
  data_files: "de/*.jsonl"
- config_name: en
  default: true
  data_files:
  - split: train
    path: ["en/part-*.parquet", "more/**/x.parquet"]
  - split: heldout
    path: en/test.parquet
---
# Texts
"""
PATHS = ["README.md", "de/a.jsonl", "en/part-1.parquet", "en/part-2.parquet", "en/test.parquet", "more/a/b/x.parquet", "en/deep/part-3.parquet"]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "readme", "config", "split", "found"),
    [
        (PATHS, README, None, "train", ["en/part-1.parquet", "en/part-2.parquet", "more/a/b/x.parquet"]),
        (PATHS, README, "en", "heldout", ["en/test.parquet"]),
        (PATHS, README, "de", "train", ["de/a.jsonl"]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], None, None, "test", ["data/test-00000-of-00001.parquet"]),
        (["train.csv", "dev.csv", "notes.md", ".hidden/train.csv"], None, None, "validation", ["dev.csv"]),
        (["de/train/0.parquet", "en/train/0.parquet"], None, "en", "train", ["en/train/0.parquet"]),
        (["data.jsonl", "run.py"], "no front matter", None, "train", ["data.jsonl"]),
        (["train.csv", "train.parquet"], "---\nconfigs: 3\n---\n", None, "train", ["train.parquet"]),
        (["data/train_sft-0.parquet", "data/test_sft-0.parquet"], None, None, "test_sft", ["data/test_sft-0.parquet"]),
    ],
)  # fmt: skip
def test_a_splits_files_are_found_by_the_readme_or_by_their_names(
    paths: list[str], readme: str | None, config: str | None, split: str, found: list[str]
) -> None:
    assert list(files_of_split(paths, readme, config, split)) == found


@pytest.mark.parametrize(
    ("files", "query", "code", "said"),
    [
        ({"train.parquet": parquet({"text": TEXTS})}, "?split=heldout", "not_found", "no split 'heldout'; it has train"),
        ({"train.parquet": parquet({"sentence": TEXTS, "label": LABELS})}, "", "invalid_data", "no column text or messages; it has sentence, label"),
        ({"train.parquet": parquet({"text": TEXTS})}, "?columns=text,rating", "invalid_data", "no column rating; it has text"),
        ({"train.jsonl": b'{"sentence": "x"}\n'}, "", "invalid_data", "it has sentence"),
        ({"train.arrow": b"x", "README.md": README.replace("en/part-*.parquet", "*.arrow").encode()}, "", "unsupported_format", "refs/convert/parquet"),
        ({"train.parquet": b"PAR1 is no Parquet PAR1"}, "", "invalid_data", "not a whole Parquet file"),
        ({"train.parquet": b""}, "", "invalid_data", "not a whole Parquet file"),
        ({"a/train.parquet": parquet({"text": TEXTS}), "b/train.parquet": parquet({"text": [1, 2]})}, "", "invalid_data", "of other types"),
        ({"train.jsonl": b"[1]\n"}, "", "invalid_data", "line 1 of train.jsonl"),
        ({"README.md": README.encode()}, "?config=fr", "not_found", "it has de, en"),
    ],
)  # fmt: skip
def test_what_a_split_lacks_is_said(
    world: World, hub: Hub, files: dict[str, bytes], query: str, code: str, said: str
) -> None:
    hub.push("datasets/acme/texts", files)
    found = refusal(fetch(world, f"hf://datasets/acme/texts@main{query}"))
    assert found[0] == code
    assert said in found[1]


@pytest.mark.parametrize("query", ["?", "?splitt=train", "?split=a&split=b", "?split=", "?columns=a b", "?columns=text:a,label:a", "/train.csv?split=test"])  # fmt: skip
def test_a_query_that_means_nothing_is_refused(query: str) -> None:
    settings = Settings(_env_file=None, hub_organisations=["acme"])
    if query == "?":
        address = parse_address("hf://datasets/acme/texts?", "datasets", settings)
        assert address.url == "hf://datasets/acme/texts@main?split=train"
        assert parse_address(address.url, "datasets", settings) == address
        return
    with pytest.raises(NightpressError) as error:
        parse_address(f"hf://datasets/acme/texts{query}", "datasets", settings)
    assert error.value.code is ErrorCode.INVALID_REQUEST


def test_a_footer_is_written_as_it_was_read() -> None:
    for options in ({}, {"compression": "zstd", "write_page_index": True}):
        data = parquet({"text": TEXTS, "label": LABELS, "messages": [[{"role": "user"}]] * 400}, **options)
        footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
        assert write_struct(read_struct(footer)) == footer


@pytest.mark.slow
def test_damaged_footers_are_refused_and_never_crash() -> None:
    data = parquet({"text": TEXTS, "label": LABELS})
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    chance, refused = random.Random(3), 0
    choice = SplitChoice("train", None, {"text": "text", "label": "label"})
    for _ in range(3000):
        damaged = bytearray(footer)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        projector = Projector("x", choice)
        try:
            projector.add(0, "train.parquet", len(data), bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])]))  # fmt: skip
            projection = projector.done()
        except NightpressError:
            refused += 1
        else:
            assert all(4 <= piece.start < piece.end <= len(data) for piece in projection.pieces)
    assert refused > 1000


def test_a_split_is_an_address_like_others() -> None:
    settings = Settings(_env_file=None, hub_organisations=["acme"])
    address = parse_address("hf://datasets/acme/texts@v1?config=en&columns=label,text:sentence", "datasets", settings)
    assert address == HubAddress("datasets", "acme/texts", "v1", "", SplitChoice("train", "en", {"label": "label", "text": "sentence"}))  # fmt: skip
    with pytest.raises(NightpressError, match="not of an organisation"):
        parse_address("hf://datasets/others/texts?split=train", "datasets", settings)
