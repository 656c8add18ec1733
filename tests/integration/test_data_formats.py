"""The formats of data sets: CSV, Parquet, conversations, padding; and chat templates that never end."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.rows import Row, read_rows
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.service import ROOT

_TALK = [{"role": "user", "content": "Is the quay lit?"}, {"role": "assistant", "content": "Since dusk."}]
_TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


def _model(folder: Path, template: str) -> Path:
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    return folder


def _jsonl(folder: Path, *rows: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_csv_and_parquet_give_the_rows_that_jsonl_gives(tmp_path: Path):
    expected = [Row("One, two.", 1), Row("Three\nfour", 0)]
    (tmp_path / "a.csv").write_text('text,label\n"One, two.",1\n"Three\nfour",0\n')
    table = pa.table({"label": [1, 0], "text": ["One, two.", "Three\nfour"], "other": [None, 2.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_rows("d", tmp_path / "a.csv") == expected
    assert read_rows("d", tmp_path / "a.parquet") == expected
    assert read_rows("d", _jsonl(tmp_path, *({"text": row.text, "label": row.label} for row in expected))) == expected


@pytest.mark.parametrize(
    ("format_", "written"),
    [("%d %b %Y", "01 Jan 2025"), ("%Y-%m-%d", "2025-01-01"), ("%B %d, %Y, %H:%M", "January 01, 2025, 00:00")],
)
def test_a_template_is_told_a_fixed_time_in_the_format_that_it_asks_for(format_: str, written: str, tmp_path: Path):
    model = _model(tmp_path / "model", "Today is {{ strftime_now('" + format_ + "') }}.")
    (row,) = read_rows("d", _jsonl(tmp_path, {"messages": _TALK}), model_dir=model)
    assert row.text == f"Today is {written}."


def test_conversations_are_written_as_the_models_template_says(tmp_path: Path):
    model = _model(tmp_path / "model", _TEMPLATE)
    rows = read_rows("d", _jsonl(tmp_path, {"messages": _TALK}, {"text": "Prose."}), model_dir=model)
    assert rows == [Row("<s><|user|>Is the quay lit?\n<|assistant|>Since dusk.\n"), Row("Prose.")]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for",
    ],
)
def test_a_template_that_reaches_out_or_never_ends_is_a_clear_error(template: str, tmp_path: Path):
    model = _model(tmp_path / "model", template)
    with pytest.raises(NightpressError) as caught:
        read_rows("d", _jsonl(tmp_path, {"messages": _TALK}), model_dir=model)
    assert caught.value.code is ErrorCode.INVALID_DATA
    assert "template" in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"words,label\nx,1\n", "line 2 has no `text`"),
        ("a.parquet", b"PAR1 and then nothing", "Parquet"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "`messages`"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "chat template"),
    ],
)
def test_bad_rows_are_named(name: str, content: bytes, says: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NightpressError) as caught:
        read_rows("d", tmp_path / name, model_dir=tmp_path)
    assert says in caught.value.message


@pytest.mark.slow
def test_rows_by_themselves_are_padded_and_masked_and_another_seed_takes_other_texts(bert_tiny: Path, tmp_path: Path):
    header = inspect_model(FolderFiles(bert_tiny))

    def samples(**wanted: object) -> dict[str, object]:
        calibration = Calibration.model_validate({"samples": 6, "length": 40, **wanted})
        return dict(
            calibration_samples(bert_tiny, PassContext(header=header, work_dir=tmp_path, calibration=calibration))
        )

    padded = samples(packing=False)
    assert set(padded) == {"input_ids", "attention_mask"}
    packed = [samples()["input_ids"].tolist() for _ in range(2)]  # type: ignore[attr-defined]
    assert packed[0] == packed[1] != samples(seed=3)["input_ids"].tolist()  # type: ignore[attr-defined]
    assert samples(seed=3)["input_ids"].tolist() == samples(seed=3)["input_ids"].tolist()  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows", [200, 200_000])
@pytest.mark.slow
def test_a_parquet_bomb_is_read_up_to_the_bound(rows: int, tmp_path: Path):
    """The same text of ten megabytes in each of many rows: the file has kilobytes, its rows have gigabytes."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * 10_000_000])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1_000_000
    program = (
        "import resource, sys; from pathlib import Path; from nightpress.core.compress.data.rows import read_rows\n"
        "import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = read_rows('d', Path(sys.argv[1]))\n"
        "print(len(rows), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.parquet")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    count, grown = map(int, done.stdout.split())
    assert count == 6
    assert grown < 512, "MiB more than before"


@pytest.mark.parametrize(
    "table",
    [
        {"text": [1, 2]},
        {"text": [b"\xff", b"a"]},
        {"text": ["a", "b"], "label": [float("nan"), 2.0]},
        {"text": ["a", "b"], "label": [100_000, 0]},
        {"words": ["a", "b"]},
        {"text": [None, None]},
    ],
)
def test_parquet_that_holds_no_rows_of_ours_is_refused(table: dict[str, list[object]], tmp_path: Path):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(NightpressError) as caught:
        read_rows("d", tmp_path / "a.parquet")
    assert caught.value.code is ErrorCode.INVALID_DATA
    assert caught.value.hint


def test_parquet_with_lists_categories_and_nulls_is_read(tmp_path: Path):
    labels = pa.array([["x", "y"], [], ["z"]])
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": labels}), tmp_path / "lists.parquet")
    assert read_rows("d", tmp_path / "lists.parquet") == [Row("a", ("x", "y")), Row("b", ()), Row("c", ("z",))]
    named = pa.array(["good", "bad", "good"]).dictionary_encode()
    pq.write_table(
        pa.table({"text": pa.array(["a", "a", None]).dictionary_encode(), "label": named}), tmp_path / "c.parquet"
    )
    assert read_rows("d", tmp_path / "c.parquet") == [Row("a", "good"), Row("a", "bad")]
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], None]
    pq.write_table(pa.table({"messages": turns, "text": [None, "b"]}), tmp_path / "m.parquet")
    model = _model(tmp_path / "model", _TEMPLATE)
    assert [row.text for row in read_rows("d", tmp_path / "m.parquet", model_dir=model)] == [
        "<s><|user|>Hi\n<|assistant|>\n",
        "b",
    ]
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.5, None]}), tmp_path / "n.parquet")
    assert read_rows("d", tmp_path / "n.parquet") == [Row("a", 1.5), Row("b")]


#: Templates as this year's models have them, cut short: what is between the marks is trained on, tools are listed, roles must alternate.
_TRAINED = """{{- bos_token }}{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{%- for message in messages %}
{%- if loop.index0 % 2 != (message.role == 'assistant') %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message['role'] == 'assistant' %}{{- '<a>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{- '<u>' + (message.content | trim) }}{% endif %}
{%- if loop.last %}{% break %}{% endif %}
{%- endfor %}{{- {'b': 1, 'a': ['é']} | tojson(ensure_ascii=False, sort_keys=True, separators=(',', ':')) }}"""


@pytest.mark.slow
def test_marks_of_what_a_model_writes_and_json_are_rendered_as_transformers_renders_them(
    bert_tiny: Path, tmp_path: Path
):
    import transformers

    model = _model(tmp_path / "model", _TRAINED)
    (row,) = read_rows("d", _jsonl(tmp_path, {"messages": _TALK}), model_dir=model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_tiny)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    theirs = tokenizer.apply_chat_template(_TALK, chat_template=_TRAINED, tokenize=False)
    assert row.text == theirs
    assert "<a>Since dusk." in row.text
    assert row.text.endswith('{"a":["é"],"b":1}')
    with pytest.raises(NightpressError, match="roles must alternate"):
        read_rows("d", _jsonl(tmp_path, {"messages": _TALK[:1] * 2}), model_dir=model)


_TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {"port": {"type": "string"}}}}}]  # fmt: skip
_CALLS = [
    {"role": "user", "content": "When is high water?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Cuxhaven"}'}}]},
    {"role": "tool", "tool_call_id": "1", "content": "14:20"},
    {"role": "assistant", "reasoning_content": "The port said so.", "content": "At 14:20."},
]  # fmt: skip
_WITH_TOOLS = """{%- if tools %}{{ tools | tojson }}
{% endif %}{%- for message in messages %}<{{ message.role }}>{{ message.reasoning_content }}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments }}]{% endfor %}{% endfor %}"""


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tools_and_their_calls_are_rendered_as_transformers_renders_them(
    bert_tiny: Path, tmp_path: Path, kind: str, as_json: bool
):
    import transformers

    model = _model(tmp_path / "model", _WITH_TOOLS)
    row = {"messages": _CALLS, "tools": json.dumps(_TOOLS) if as_json else _TOOLS}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row, {"messages": _TALK}]), tmp_path / "a.parquet")
        rows = read_rows("d", tmp_path / "a.parquet", model_dir=model)
    else:
        rows = read_rows("d", _jsonl(tmp_path, row, {"messages": _TALK}), model_dir=model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_tiny)
    expected = [
        tokenizer.apply_chat_template(talk, tools=tools, chat_template=_WITH_TOOLS, tokenize=False)
        for talk, tools in ((_CALLS, _TOOLS), (_TALK, None))
    ]
    assert [found.text for found in rows] == expected
    assert '[tide {"port": "Cuxhaven"}]' in expected[0]


@pytest.mark.parametrize("tools", ["no JSON", "3", 3, ["tide"]])
def test_tools_that_are_none_are_refused(tmp_path: Path, tools: object):
    with pytest.raises(NightpressError, match="line 1: `tools` is no list of functions"):
        read_rows("d", _jsonl(tmp_path, {"messages": _TALK, "tools": tools}), model_dir=tmp_path)


def test_parquet_is_as_lenient_as_jsonl(tmp_path: Path):
    table = pa.table({"text": ["a", None, " ", "b"], "label": ["pos", "neg", "neg", "3"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_rows("d", tmp_path / "a.parquet") == [Row("a", "pos"), Row("b", 3)]
