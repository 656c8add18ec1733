"""A graph whose products read quantized inputs and weights: `DequantizeLinear(QuantizeLinear(x))` and `DequantizeLinear(int8 weight)` (QDQ)."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from core.compress.passes.quantize_graph import (
    array_of,
    codes_of,
    effect_of,
    fold_transposes,
    lies_on_grid,
    quantize_embeddings,
    smooth_inputs,
    something,
    store_in_int8,
)
from core.compress.solvers import activation_ranges
from core.compress.solvers.activation_ranges import Range
from core.handoff.report import LayerEffect
from core.recipes.linears import matches
from core.recipes.passes import StaticInt8

FactorsOf = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class QdqGraph:
    """A graph with its embeddings in int8, and the products that may follow."""

    model: Any  #: onnx.ModelProto
    inputs: Mapping[str, str]  #: product → the tensor it is given
    codes: Mapping[str, tuple[NDArray[np.int8], NDArray[np.float32]]]  #: weight → codes [in, out] and scales [out]
    tables: tuple[LayerEffect, ...]  #: of the embeddings

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @classmethod
    def of(cls, graph: Path, options: StaticInt8, top: int, factors_of: FactorsOf | None = None) -> "QdqGraph":
        """factors_of: what its products' inputs are divided by, see `smooth_inputs`; None: they are taken as they come."""
        import onnx

        model = onnx.load(graph)
        fold_transposes(onnx, model)
        constants = {one.name: one for one in model.graph.initializer}
        products = [
            node
            for node in model.graph.node
            if node.op_type == "MatMul"
            and node.input[0] not in constants
            and len(getattr(constants.get(node.input[1]), "dims", ())) == 2
            and not matches(node.name, options.ignore)
            and not matches(node.input[1], options.ignore)
        ]
        something(products, options.pass_)
        # Weights that were trained on the grid of int8 keep their codes.
        if factors_of and not any(lies_on_grid(array_of(onnx, constants[node.input[1]]), 0) for node in products):
            smooth_inputs(onnx, model, products, factors_of)
        inputs, codes = {}, {}
        for node in products:
            rounded, scales = codes_of(array_of(onnx, constants[node.input[1]]), 0, top)
            inputs[node.name], codes[node.input[1]] = node.input[0], (rounded, scales[0])
        tables = quantize_embeddings(onnx, model, constants, options.ignore)
        return cls(model, inputs, codes, tuple(tables))

    def effects(self, left: Collection[str]) -> tuple[LayerEffect, ...]:
        """What rounding did to each weight; those of products left in float have all of int8's range."""
        import onnx

        constants = {one.name: one for one in self.model.graph.initializer}
        found = []
        for node in self.model.graph.node:
            if node.name not in self.inputs:
                continue
            weight = array_of(onnx, constants[node.input[1]])
            codes, scales = codes_of(weight, 0) if node.name in left else self.codes[node.input[1]]
            found.append(effect_of(node.name, weight, codes * scales))
        return (*found, *self.tables)

    def written(self, ranges: Mapping[str, Range], left: Collection[str]) -> bytes:
        """The graph with all products in int8 but those that are left in float, whose weights alone are."""
        import onnx

        helper, numpy_helper = onnx.helper, onnx.numpy_helper
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        nodes, constants, made = [], [], set()
        for node in model.graph.node:
            if node.name not in self.inputs or node.name in left:
                nodes.append(node)
                continue
            x, weight = node.input
            if x not in made:  # queries, keys and values are given the same codes
                made.add(x)
                scale, zero = activation_ranges.scale_and_zero(ranges[x])
                constants += [
                    numpy_helper.from_array(np.asarray(scale), f"{x}_scale"),
                    numpy_helper.from_array(np.asarray(zero), f"{x}_zero"),
                ]
                grid = [f"{x}_scale", f"{x}_zero"]
                nodes.append(helper.make_node("QuantizeLinear", [x, *grid], [f"{x}_uint8"], f"{x}_quantize"))
                nodes.append(
                    helper.make_node("DequantizeLinear", [f"{x}_uint8", *grid], [f"{x}_seen"], f"{x}_dequantize")
                )
            if weight not in made:
                made.add(weight)
                codes, scales = self.codes[weight]
                constants += [
                    numpy_helper.from_array(codes, f"{weight}_int8"),
                    numpy_helper.from_array(scales, f"{weight}_scales"),
                    numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{weight}_zeros"),
                ]
                parts = [f"{weight}_int8", f"{weight}_scales", f"{weight}_zeros"]
                nodes.append(
                    helper.make_node("DequantizeLinear", parts, [f"{weight}_float"], f"{weight}_dequantize", axis=1)
                )
            node.input[0], node.input[1] = f"{x}_seen", f"{weight}_float"
            nodes.append(node)
        used = {name for node in nodes for name in node.input}
        constants += [one for one in model.graph.initializer if one.name in used]
        for field, found in ((model.graph.node, nodes), (model.graph.initializer, constants)):
            del field[:]
            field.extend(found)
        store_in_int8(onnx, model, left)
        return bytes(model.SerializeToString(deterministic=True))
