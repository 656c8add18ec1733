"""A data set's column `slice`: how it is read, how examples are shared among slices, and how figures, gates and pages name them."""

import csv
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.client.cli.comparison import print_report
from nightpress.core.compress import report as reports
from nightpress.core.compress.data.rows import read_rows
from nightpress.core.compress.data.slices import draw, shares
from nightpress.core.compress.evaluate import gates
from nightpress.core.compress.evaluate.screening import surely_missed
from nightpress.core.compress.evaluate.slices import worst_first
from nightpress.core.compress.evaluate.statistics import expanded_tail
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.compare import compare
from nightpress.core.handoff.report import GateResult, Measurement, Slice, Subject
from nightpress.core.handoff.reproduction import judge
from nightpress.core.recipes.gates import parse_gate, read_gate
from nightpress.core.recipes.models import parse_recipe
from tests.reports import full_report

ROWS = [("one", "code"), ("two", None), ("three", "code"), ("four", "2"), ("five", "  ")]
NAMES = ["code", None, "code", "2", None]


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_kind_of_file_names_slices(tmp_path: Path, kind: str):
    file = tmp_path / f"rows.{kind}"
    texts, names = [text for text, _ in ROWS], [name for _, name in ROWS]
    if kind == "parquet":
        column = pa.array(names).dictionary_encode()  # a category, as pandas writes it
        pyarrow.parquet.write_table(pa.table({"text": texts, "slice": column}), file)
    elif kind == "csv":
        with file.open("w", newline="") as out:
            csv.writer(out).writerows([("text", "slice"), *ROWS])
    else:
        whole = [2 if name == "2" else name for name in names]  # a number is a name, too
        file.write_text("".join(json.dumps({"text": t, "slice": n}) + "\n" for t, n in zip(texts, whole, strict=True)))
    assert [row.slice for row in read_rows("rows", file)] == NAMES


@pytest.mark.parametrize("raw", [["code"], {"a": 1}, True, 1.5, "x" * 65, "a[b]", "two\nlines"])
def test_a_slice_that_is_no_short_name_is_refused_with_its_line(tmp_path: Path, raw: object):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n' + json.dumps({"text": "b", "slice": raw}))
    with pytest.raises(NightpressError, match="line 2: `slice` is not a name") as caught:
        read_rows("rows", file)
    assert caught.value.code is ErrorCode.INVALID_DATA


# Sharing -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(0, 200))
@pytest.mark.slow
def test_slices_get_equal_shares_as_far_as_they_go(available: list[int], wanted: int):
    found = shares(available, wanted)
    assert sum(found) == min(wanted, sum(available))
    assert all(part <= room for part, room in zip(found, available, strict=True))
    unfilled = [part for part, room in zip(found, available, strict=True) if part < room]
    assert (
        all(part <= min(unfilled, default=0) + 1 for part in found) or not unfilled
    )  # nobody has more than those who could take more


def test_a_rare_slice_is_drawn_as_often_as_a_frequent_one():
    names = ["prose"] * 900 + ["code"] * 80 + ["chat"] * 20
    drawn = draw(names, 60, 3)
    assert Counter(names[at] for at in drawn) == {"prose": 20, "code": 20, "chat": 20}
    assert len(set(drawn.tolist())) == 60
    assert draw(names, 60, 3).tolist() == drawn.tolist() != draw(names, 60, 4).tolist()


def test_without_slices_the_draw_is_the_plain_one():
    assert draw([None] * 50, 20, 7).tolist() == np.random.default_rng(7).permutation(50)[:20].tolist()


# Intervals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "student"), [(10, 2.262157), (16, 2.131450), (64, 1.998341)])
def test_intervals_of_few_examples_are_as_wide_as_students(count: int, student: float):
    """student: the 97.5% quantile of Student's t with count − 1 degrees of freedom, from a table."""
    below = (1 + math.erf(-student * math.sqrt(count / (count - 1)) / math.sqrt(2))) / 2
    assert expanded_tail(count) == pytest.approx(below, rel=1e-3)


# Gates ---------------------------------------------------------------------------------------------------------------


def _figure(name: str, value: float, low: float | None, high: float | None, **more: Any) -> Measurement:
    better = "lower" if name in {"kl_divergence", "perplexity", "flips"} else "higher"
    return Measurement(name=name, value=value, low=low, high=high, n=100, better=better, data="mixed", **more)


def _slice(name: str, value: float, examples: int = 16) -> Slice:
    wide = examples >= 10
    figure = _figure("kl_divergence", value, value - 0.02 if wide else None, value + 0.02 if wide else None)
    return Slice(name=name, data="mixed", examples=examples, measurements=(figure,))


def _subject(name: str, *slices: Slice) -> Subject:
    whole = _figure("kl_divergence", 0.1, 0.09, 0.11)
    return Subject(name=name, format=name, size_bytes=10, measurements=(whole,), slices=slices)


def _decided(figure: str, bound: str, *slices: Slice, others: tuple[Slice, ...] = ()) -> GateResult:
    recipe = {"name": "t", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"], "gates": {figure: bound}}
    artifacts = (_subject("a", *slices), *([_subject("b", *others)] if others else []))
    return gates.decide(parse_recipe(recipe), _subject("source"), artifacts)[0]


def test_a_gate_on_a_slice_is_decided_by_the_end_of_its_interval():
    parts = _slice("code", 0.19), _slice("prose", 0.05)
    passed, missed = (_decided("kl_divergence[code]", bound, *parts) for bound in ("<= 0.22", "<= 0.2"))
    assert passed.passed
    assert passed.gate == "kl_divergence[code] <= 0.22"
    assert not missed.passed
    assert missed.observed == pytest.approx(0.21)
    assert "slice code" in missed.explanation


def test_a_gate_on_every_slice_is_decided_by_the_worst():
    parts = _slice("prose", 0.05), _slice("code", 0.19)
    assert _decided("kl_divergence[*]", "<= 0.22", *parts).passed
    assert _decided("kl_divergence[*]", "<= 0.2", *parts).observed == pytest.approx(0.21)


@pytest.mark.parametrize(
    ("figure", "parts", "said"),
    [
        ("kl_divergence[code]", (), "no data set of this recipe has rows with a `slice`"),
        ("kl_divergence[*]", (), "no data set of this recipe has rows with a `slice`"),
        ("kl_divergence[poems]", (_slice("code", 0.1), _slice("prose", 0.1)), "there are: code, prose"),
        ("accuracy[code]", (_slice("code", 0.1),), "not measured on this slice"),
        ("kl_divergence[code]", (_slice("code", 0.01, 9),), "code of mixed has 9"),
        ("kl_divergence[*]", (_slice("prose", 0.01), _slice("code", 0.01, 9)), "code of mixed has 9"),
        ("kl_divergence[*]", (_slice("prose", 0.01), Slice(name="x", data="d", examples=1)), "x of d has 1"),
    ],
)
def test_a_slice_that_was_not_measured_misses_its_gate(figure: str, parts: tuple[Slice, ...], said: str):
    found = _decided(figure, "<= 0.9" if figure.startswith("kl") else ">= 0.1", *parts)
    assert not found.passed
    assert found.observed is None
    assert said in found.explanation


def test_a_slice_that_only_another_artifact_has_misses_the_gate():
    found = _decided(
        "kl_divergence[*]", "<= 1", _slice("prose", 0.1), others=(_slice("prose", 0.1), _slice("code", 0.1))
    )
    assert not found.passed
    assert "slice code" in found.explanation


def test_a_gate_on_all_data_ignores_slices():
    assert _decided("kl_divergence", "<= 0.2", _slice("code", 0.9)).passed


def test_a_screening_leaves_gates_on_slices_to_the_whole_evaluation():
    bad = _figure("kl_divergence", 5.0, 4.9, 5.1)
    assert surely_missed([parse_gate("kl_divergence", "<= 0.1")], [bad], "screening")
    assert not surely_missed([parse_gate("kl_divergence[code]", "<= 0.1")], [bad], "screening")


@pytest.mark.parametrize("text", ["kl_divergence[code] <= 0.2", "accuracy[second language] >= -1%", "flips[*] < 0.05"])
def test_a_gate_with_a_slice_is_read_as_it_is_written(text: str):
    gate = parse_gate(*read_gate(text))
    assert str(gate) == text
    assert gate.slice == text[text.index("[") + 1 : text.index("]")]


@pytest.mark.parametrize("figure", ["size[code]", "latency[code]", "memory[*]", "decode_tokens_per_s[code]"])
def test_what_belongs_to_the_whole_artifact_has_no_slice(figure: str):
    with pytest.raises(ValueError, match="not of a slice"):
        parse_gate(figure, "<= 50%")


@pytest.mark.parametrize("figure", ["kl_divergence[]", "kl_divergence[a", "kl_divergence[a]b", "kl_divergence[a][b]"])
def test_a_malformed_slice_is_no_figure(figure: str):
    with pytest.raises(ValueError, match="is not one of"):
        parse_gate(figure, "<= 1")


# Pages ---------------------------------------------------------------------------------------------------------------


def test_the_farthest_from_the_source_come_first():
    agreeing = Slice(name="words", data="d", examples=20, measurements=(_figure("centred_cosine", 0.5, 0.4, 0.6),))
    found = worst_first([_slice("a", 0.1), Slice(name="bare", data="d", examples=1), agreeing, _slice("b", 0.3)])
    assert [part.name for part in found] == ["b", "a", "words", "bare"]


def test_pages_and_the_command_line_show_slices_worst_first(capsys: pytest.CaptureFixture[str]):
    report = full_report()
    print_report(report.model_dump(mode="json"))
    for drawn in (capsys.readouterr().out, reports.render_html(report), reports.render_markdown(report)):
        assert 0 < drawn.index("second language") < drawn.replace("&amp;", "&").index("chat & code")
        assert "Right answers that became wrong" in drawn or "right_to_wrong" in drawn


def test_jobs_are_compared_by_a_slice():
    found = compare([full_report()], "flips[second language]")
    assert found.metric == "flips[second language]"
    assert {point.artifact: point.quality for point in found.points} == {
        "source": 0.0,
        "onnx": 0.125,
        "openvino": 0.125,
    }
    assert compare([full_report()], "flips[novels]").metric is None


def test_a_repeated_run_is_held_to_its_slices():
    before = full_report()
    moved = [
        part.model_copy(update={"measurements": (_figure("flips", 0.9, 0.8, 1.0, of=""),)})
        for part in before.artifacts[0].slices
    ]
    after = before.model_copy(
        update={"artifacts": (before.artifacts[0].model_copy(update={"slices": tuple(moved)}), before.artifacts[1])}
    )
    assert judge(before, before).outcome == "identical"
    assert judge(before, after).outcome == "different"
