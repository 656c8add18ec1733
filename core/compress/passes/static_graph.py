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
    def operands(self) -> tuple[tuple[str, str], ...]:
        """(product, tensor that it is given and that needs a range)."""
        scores = ((name, x.tensor) for name, one in self.scores.items() for x in (one.query, one.key))
        return (*self.inputs.items(), *scores)

    @property
    def rounded(self) -> tuple[str, ...]:
        """The tensors that need ranges, product by product."""
        return tuple(tensor for _, tensor in self.operands)

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

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        new = _Written(onnx)
        operands = {}
        for name, scores in self.scores.items():
            if name not in left:
                operands[scores.query.reader, scores.query.tensor] = "query", _TOP
                operands[scores.key.reader, scores.key.tensor] = "key", self.top
        for node in model.graph.node:
            for at, name in enumerate(node.input):
                if (node.name, name) in operands:
                    kind, top = operands[node.name, name]
                    scale = activation_ranges.symmetric_scale(ranges[name], top)
                    node.input[at] = new.rounded(name, kind, scale, np.int8(0))
            if node.name in self.inputs and node.name not in left:
                x, weight = node.input
                node.input[0] = new.rounded(x, "uint8", *activation_ranges.scale_and_zero(ranges[x]))
                node.input[1] = new.weight(weight, *self.codes[weight])
            new.nodes.append(node)
        used = {name for node in new.nodes for name in node.input}
        new.constants += [one for one in model.graph.initializer if one.name in used]
        for field, found in ((model.graph.node, new.nodes), (model.graph.initializer, new.constants)):
            del field[:]
            field.extend(found)
        store_in_int8(onnx, model, set(left) & set(self.inputs))
        return bytes(model.SerializeToString(deterministic=True))


class _Written:
    """Nodes in their order and their constants. What several nodes read is made once, before the first of them."""

    def __init__(self, onnx: Any) -> None:
        self._make, self._constant = onnx.helper.make_node, onnx.numpy_helper.from_array
        self._made: set[str] = set()
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def rounded(self, name: str, kind: str, scale: np.float32, zero: np.generic) -> str:
        """The name of a tensor's values once they were rounded to codes."""
        codes = f"{name}_{kind}"
        seen = f"{codes}_seen"
        if seen not in self._made:
            self._made.add(seen)
            grid = [f"{codes}_scale", f"{codes}_zero"]
            self.constants += [self._constant(np.asarray(one), at) for one, at in zip((scale, zero), grid, strict=True)]
            self.nodes.append(self._make("QuantizeLinear", [name, *grid], [codes], f"{codes}_quantize"))
            self.nodes.append(self._make("DequantizeLinear", [codes, *grid], [seen], f"{codes}_dequantize"))
        return seen

    def weight(self, name: str, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> str:
        """The name of a weight's values: codes [in, out], scales [out]."""
        floats = f"{name}_float"
        if floats not in self._made:
            self._made.add(floats)
            parts = [f"{name}_int8", f"{name}_scales", f"{name}_zeros"]
            values = (codes, scales, np.zeros(len(scales), np.int8))
            self.constants += [self._constant(one, at) for one, at in zip(values, parts, strict=True)]
            self.nodes.append(self._make("DequantizeLinear", parts, [floats], f"{name}_dequantize", axis=1))
        return floats
