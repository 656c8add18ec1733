"""bench.search: a space without formats that the machine can't run."""

from typing import Any

import pytest

from bench.search import _without


@pytest.mark.parametrize(
    ("export", "left"),
    [
        ("onnx", "onnx"),
        ("openvino", None),
        ({"choice": ["openvino", "onnx"]}, {"choice": ["onnx"]}),
        ({"choice": ["openvino"]}, None),
        (
            {"format": {"choice": ["openvino", "onnx"]}, "type": "fp16"},
            {"format": {"choice": ["onnx"]}, "type": "fp16"},
        ),
        ({"format": "openvino", "type": "fp16"}, None),
    ],
)
def test_a_format_that_the_machine_can_not_run_is_left_out(export: Any, left: Any):
    assert _without(export, ["openvino"]) == left
