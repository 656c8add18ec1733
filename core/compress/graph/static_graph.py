"""A graph whose products read quantized inputs and weights: `DequantizeLinear(QuantizeLinear(x))`, `DequantizeLinear(int8 weight)` (QDQ).

Attention's scores are a product of two inputs, queries and keys. Each is rounded where it is computed, before it is split into heads and
transposed. So these operations move bytes instead of floats, which is cheaper.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nightpress.core.compress.graph.attention_scores import Scores, score_products
from nightpress.core.compress.graph.dynamic_int8 import (
    array_of,
    codes_of,
    effect_of,
    fold_transposes,
    is_smoothing,
    lies_on_grid,
    quantize_embeddings,
    readers_by_input,
    refuse_if_empty,
    smooth_inputs,
    store_in_int8,
)
from nightpress.core.compress.graph.lists import replace_all
from nightpress.core.compress.grids import activation_ranges
from nightpress.core.compress.grids.activation_ranges import Range
from nightpress.core.compress.solvers.static_weights import StaticWeight
from nightpress.core.handoff.report import LayerEffect
from nightpress.core.recipes.linears import matches
from nightpress.core.recipes.passes import StaticInt8

_TOP = 127  #: largest code of a query

#: (name of an input, weights [out, in] of all products that read it, stacked) → smoothing factors and codes
Settle = Callable[[str, Tensor], StaticWeight]


@dataclass(frozen=True)
class Weight:
    """A product's weight in the two forms that a graph may hold."""

    codes: NDArray[np.int8]  #: [in, out], no larger than the processor can sum without overflow
    scales: NDArray[np.float32]  #: [out]
    stored: NDArray[np.int8]  #: [in, out], not smoothed, full range of int8: for a product that stays in float
    stored_scales: NDArray[np.float32]  #: [1, out]
    effect: LayerEffect  #: the rounding error of `codes`
    stored_effect: LayerEffect  #: the rounding error of `stored`


@dataclass(frozen=True)
class QdqGraph:
    """A graph with int8 embeddings and the products that can be quantized. The weights are kept outside the graph."""

    model: Any  #: onnx.ModelProto
    inputs: Mapping[str, str]  #: product → the tensor that it reads
    plain_inputs: Mapping[str, str]  #: product → that tensor before smoothing
    weights: Mapping[str, Weight]  #: name in the graph → weight
    scores: Mapping[str, Scores]  #: attention's product → queries and keys
    #: product → share of its outputs' power that rounding changed; only products whose weights were chosen by `settle`
    costs: Mapping[str, float]
    top: int  #: the largest code of a key
    tables: tuple[LayerEffect, ...]  #: the rounding errors of the embeddings

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.inputs, *self.scores)

    def work(self, length: int) -> dict[str, int]:
        """Product → its multiply-adds for each token, in texts of `length` tokens."""
        products = {
            node.name: self.weights[node.input[1]].codes.size
            for node in self.model.graph.node
            if node.name in self.inputs
        }
        width = min(weight.codes.shape[0] for weight in self.weights.values())  # that of the hidden states
        return products | dict.fromkeys(self.scores, length * width)

    @property
    def operands(self) -> tuple[tuple[str, str], ...]:
        """Pairs of a product and a tensor that it reads and that needs a range."""
        scores = ((name, x.tensor) for name, score in self.scores.items() for x in (score.query, score.key))
        return (*self.inputs.items(), *scores)

    @property
    def rounded(self) -> tuple[str, ...]:
        """The tensors that need ranges, product by product."""
        return tuple(tensor for _, tensor in self.operands)

    @classmethod
    def of(cls, graph: Path, options: StaticInt8, top: int, settle: Settle | None = None) -> "QdqGraph":
        """Read a graph and round its weights. top: the largest code of a weight and of a key.

        settle chooses smoothing factors and codes. If it is None, inputs are not smoothed and each weight is rounded to nearest. Raises
        NightpressError(invalid_recipe) if `options.ignore` leaves no product.
        """
        import onnx

        model = onnx.load(graph)
        fold_transposes(onnx, model)
        constants = {initializer.name: initializer for initializer in model.graph.initializer}
        products = [
            node
            for node in model.graph.node
            if node.op_type == "MatMul"
            and node.input[0] not in constants
            and len(getattr(constants.get(node.input[1]), "dims", ())) == 2
            and not matches(node.name, options.ignore)
            and not matches(node.input[1], options.ignore)
        ]
        refuse_if_empty(products, options.name)
        # A product that stays in float has an unsmoothed weight: after smoothing, strong channels would take most of each scale's range.
        plain_inputs = {node.name: node.input[0] for node in products}
        names = dict.fromkeys(node.input[1] for node in products)
        stored = {name: codes_of(array_of(onnx, constants[name]), 0) for name in names}
        lost = {
            name: effect_of(name, array_of(onnx, constants[name]), codes * scales)
            for name, (codes, scales) in stored.items()
        }
        settled, costs = _settled(onnx, model, products, settle) if settle else ({}, {})
        weights = {}
        for name in names:
            floats = array_of(onnx, constants[name])
            codes, scales = settled.get(name) or codes_of(floats, 0, top)
            effect = effect_of(name, floats, codes * scales)
            weights[name] = Weight(codes, scales.reshape(-1), *stored[name], effect, lost[name])
            constants[name].ClearField("raw_data")
        # A decoder's keys are those of all tokens before: rounding them at every token would take longer than their product in float.
        cached = any(value.name.startswith("past_key_values.") for value in model.graph.input)
        scores = {
            name: score_product
            for name, score_product in score_products(model.graph).items()
            if not cached and not matches(name, options.ignore)
        }
        tables = quantize_embeddings(onnx, model, constants, options.ignore)
        inputs = {node.name: node.input[0] for node in products}
        return cls(model, inputs, plain_inputs, weights, scores, costs, top, tuple(tables))

    def effects(self, left: Collection[str]) -> tuple[LayerEffect, ...]:
        """The rounding error of each weight. left: products that stay in float; their weights use the full range of int8."""
        found = []
        for node in self.model.graph.node:
            if node.name in self.inputs:
                weight = self.weights[node.input[1]]
                effect = weight.stored_effect if node.name in left else weight.effect
                found.append(effect.model_copy(update={"name": node.name}))
        return (*found, *self.tables)

    def written(self, ranges: Mapping[str, Range], left: Collection[str]) -> bytes:
        """Serialize the graph with all products in int8, except those in `left`: these stay in float, and only their weights are int8."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        new = _GraphBuilder(onnx)
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
                node.input[1] = new.weight(weight, self.weights[weight])
            elif node.name in self.inputs:
                node.input[0] = self.plain_inputs[node.name]
            new.nodes.append(node)
        used = {name for node in new.nodes for name in node.input}
        new.nodes = [node for node in new.nodes if not is_smoothing(node) or node.output[0] in used]
        used = {name for node in new.nodes for name in node.input}
        new.constants += [initializer for initializer in model.graph.initializer if initializer.name in used]
        replace_all(model.graph.node, new.nodes)
        replace_all(model.graph.initializer, new.constants)
        floats = dict.fromkeys(
            node.input[1] for node in model.graph.node if node.name in left and node.name in self.inputs
        )
        store_in_int8(
            onnx, model, {name: (self.weights[name].stored, self.weights[name].stored_scales) for name in floats}
        )
        return bytes(model.SerializeToString(deterministic=True))


def _settled(
    onnx: Any, model: Any, products: list[Any], settle: Settle
) -> tuple[dict[str, tuple[NDArray[np.int8], NDArray[np.float32]]], dict[str, float]]:
    """Smooth the products' inputs in place. Returns (weight → codes [in, out] and scales [1, out], product → its cost).

    Weights that were trained on the grid of int8 are left out, and their inputs are not smoothed.
    """
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    free = [node for node in products if not lies_on_grid(array_of(onnx, constants[node.input[1]]), 0)]
    readers = readers_by_input(model, free)
    found: dict[str, StaticWeight] = {}

    def factors_of(name: str, weight: Tensor) -> Tensor:
        found[name] = settle(name, weight)
        return found[name].factors

    smooth_inputs(onnx, model, free, factors_of)
    codes, costs = {}, {}
    for name, nodes in readers.items():
        first, settled = 0, found[name]
        for node in nodes:
            rows = slice(first, first + constants[node.input[1]].dims[1])
            codes[node.input[1]] = np.ascontiguousarray(settled.codes[rows].T), settled.scales[None, rows]
            costs[node.name] = float(settled.error[rows].sum() / max(settled.power[rows].sum(), 1e-30))
            first = rows.stop
    return codes, costs


class _GraphBuilder:
    """The new graph's nodes in order, and its constants. A value that several nodes read is made once, before the first of these nodes."""

    def __init__(self, onnx: Any) -> None:
        self._make, self._constant = onnx.helper.make_node, onnx.numpy_helper.from_array
        self._made: set[str] = set()
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def rounded(self, name: str, kind: str, scale: np.float32, zero: np.generic) -> str:
        """Return the name of a tensor's values after quantizing and dequantizing."""
        codes = f"{name}_{kind}"
        seen = f"{codes}_seen"
        if seen not in self._made:
            self._made.add(seen)
            grid = [f"{codes}_scale", f"{codes}_zero"]
            self.constants += [
                self._constant(np.asarray(value), at) for value, at in zip((scale, zero), grid, strict=True)
            ]
            self.nodes.append(self._make("QuantizeLinear", [name, *grid], [codes], f"{codes}_quantize"))
            self.nodes.append(self._make("DequantizeLinear", [codes, *grid], [seen], f"{codes}_dequantize"))
        return seen

    def weight(self, name: str, weight: Weight) -> str:
        """Return the name of a weight's dequantized values."""
        floats = f"{name}_float"
        if floats not in self._made:
            self._made.add(floats)
            parts = [f"{name}_int8", f"{name}_scales", f"{name}_zeros"]
            values = (weight.codes, weight.scales, np.zeros(len(weight.scales), np.int8))
            self.constants += [self._constant(value, at) for value, at in zip(values, parts, strict=True)]
            self.nodes.append(self._make("DequantizeLinear", parts, [floats], f"{name}_dequantize", axis=1))
        return floats
