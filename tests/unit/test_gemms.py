"""A Gemm by a constant matrix becomes a MatMul and an Add that answer alike; any other Gemm stays."""

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nightpress.core.compress.graph.gemms import divide_gemms

_RANDOM = np.random.default_rng(0)
_ROWS: NDArray[np.float32] = _RANDOM.standard_normal((3, 4)).astype(np.float32)


def _model(*, biased: bool, **options: Any) -> Any:
    shape = (5, 4) if options.get("transB") else (4, 5)
    constants = {"weight": _RANDOM.standard_normal(shape), "bias": _RANDOM.standard_normal(5)}
    names = ["weight", "bias"] if biased else ["weight"]
    node = helper.make_node("Gemm", ["rows", *names], ["out"], "layer", **options)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [3, 5])],
        [numpy_helper.from_array(constants[name].astype(np.float32), name) for name in names],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("options", [{}, {"transB": 1}, {"transB": 1, "alpha": 1.0, "beta": 1.0}], ids=str)
def test_a_gemm_becomes_a_product_with_the_same_name_and_answer(options: dict[str, Any], biased: bool) -> None:
    model = _model(biased=biased, **options)
    before = ReferenceEvaluator(model).run(None, {"rows": _ROWS})[0]
    divide_gemms(onnx, model)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"][: 1 + biased]
    assert model.graph.node[0].name == "layer"
    assert len(model.graph.initializer) == 1 + biased  # the weight in its old order is gone
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, {"rows": _ROWS})[0], before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"beta": 2.0}], ids=str)
def test_a_gemm_with_factors_stays(options: dict[str, Any]) -> None:
    model = _model(biased=True, **options)
    divide_gemms(onnx, model)
    assert [node.op_type for node in model.graph.node] == ["Gemm"]
