"""Products that read rows without a batch, such as those of GPT-2 and of a mixture's experts: the exporter makes each a Gemm."""

from typing import Any

import numpy as np

from nightpress.core.compress.graph.lists import drop_unread_constants, replace_all


def divide_gemms(onnx: Any, model: Any) -> None:
    """Replace each Gemm by a constant matrix with a MatMul and an Add, in place: quantizers take a MatMul by a matrix [in, out] alone."""
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        options = {option.name: onnx.helper.get_attribute_value(option) for option in node.attribute}
        turned = options.pop("transB", 0)
        plain = all(value == (1 if name in {"alpha", "beta"} else 0) for name, value in options.items())
        if node.op_type != "Gemm" or node.input[1] not in constants or not plain:
            nodes.append(node)
            continue
        weight = f"{node.input[1]}_turned" if turned else node.input[1]
        if weight not in constants:
            array = np.ascontiguousarray(onnx.numpy_helper.to_array(constants[node.input[1]]).T)
            constants[weight] = onnx.numpy_helper.from_array(array, weight)
            model.graph.initializer.append(constants[weight])
        bias = next(iter(node.input[2:]), "")
        product = f"{node.output[0]}_product" if bias else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], weight], [product], node.name))
        if bias:
            nodes.append(onnx.helper.make_node("Add", [product, bias], [node.output[0]], f"{node.name}_bias"))
    replace_all(model.graph.node, nodes)
    drop_unread_constants(model.graph)
