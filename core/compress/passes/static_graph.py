"""A graph whose products read quantized inputs and weights: `DequantizeLinear(QuantizeLinear(x))` and `DequantizeLinear(int8 weight)` (QDQ).

Attention's scores are a product of two inputs, queries and keys, and each is rounded where it is made: before it is split into heads and turned,
which bytes make cheaper too.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from core.compress.passes.attention_scores import Scores, score_products
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

_TOP = 127  #: of a query's codes

FactorsOf = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class QdqGraph:
    """A graph with its embeddings in int8, and the products that may follow."""

    model: Any  #: onnx.ModelProto
    inputs: Mapping[str, str]  #: product → the tensor it is given
    codes: Mapping[str, tuple[NDArray[np.int8], NDArray[np.float32]]]  #: weight → codes [in, out] and scales [out]
    scores: Mapping[str, Scores]  #: attention's product → queries and keys
    top: int  #: the largest code of a weight, and of a key
    tables: tuple[LayerEffect, ...]  #: of the embeddings

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.inputs, *self.scores)

    @property
    def rounded(self) -> tuple[str, ...]:
        """The tensors that need ranges, product by product."""
        operands = (x for one in self.scores.values() for x in (one.query, one.key))
        return (*self.inputs.values(), *(one.tensor for one in operands))

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
        scores = {name: one for name, one in score_products(model.graph).items() if not matches(name, options.ignore)}
        tables = quantize_embeddings(onnx, model, constants, options.ignore)
        return cls(model, inputs, codes, scores, top, tuple(tables))

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
        nodes: list[Any] = []
        constants: list[Any] = []
        made = set()

        def rounded(name: str, kind: str, scale: np.float32, zero: np.generic) -> str:
            """The tensor's name once it was rounded to codes; those who share it are given the same ones."""
            seen = f"{name}_{kind}_seen"
            if seen not in made:
                made.add(seen)
                grid = [f"{name}_{kind}_scale", f"{name}_{kind}_zero"]
                for value, constant in zip((scale, zero), grid, strict=True):
                    constants.append(numpy_helper.from_array(np.asarray(value), constant))
                codes = f"{name}_{kind}"
                nodes.append(helper.make_node("QuantizeLinear", [name, *grid], [codes], f"{codes}_quantize"))
                nodes.append(helper.make_node("DequantizeLinear", [codes, *grid], [seen], f"{codes}_dequantize"))
            return seen

        tops = {}
        for name, scores in self.scores.items():
            if name not in left:
                tops[scores.query.reader, scores.query.tensor] = _TOP
                tops[scores.key.reader, scores.key.tensor] = self.top
        for node in model.graph.node:
            for at, name in enumerate(node.input):
                top = tops.get((node.name, name))
                if top is not None:
                    scale = activation_ranges.symmetric_scale(ranges[name], top)
                    node.input[at] = rounded(name, "int8", scale, np.int8(0))
            if node.name in self.inputs and node.name not in left:
                x, weight = node.input
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
                node.input[0] = rounded(x, "uint8", *activation_ranges.scale_and_zero(ranges[x]))
                node.input[1] = f"{weight}_float"
            nodes.append(node)
        used = {name for node in nodes for name in node.input}
        constants += [one for one in model.graph.initializer if one.name in used]
        for field, found in ((model.graph.node, nodes), (model.graph.initializer, constants)):
            del field[:]
            field.extend(found)
        store_in_int8(onnx, model, set(left) & set(self.inputs))
        return bytes(model.SerializeToString(deterministic=True))
