"""Rows for every metric come in; what no metric reads stays out."""

import pytest

from core.errors import NightpressError
from core.recipes.datafile import DataFacts, examine_data


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
