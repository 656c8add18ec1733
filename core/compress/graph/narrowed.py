"""A traced encoder with narrower attention or feed-forward in every layer, for measuring how long each takes at each width.

The weights are those of the first units: a graph's time does not depend on its numbers. One trace is enough for all widths.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nightpress.core.compress.graph.dynamic_int8 import array_of, codes_of, fold_transposes
from nightpress.core.compress.graph.lists import replace_all
from nightpress.core.compress.graph.static_graph import QdqGraph
from nightpress.core.compress.graph.unread import without_unread_positions
from nightpress.core.compress.grids.activation_ranges import Range
from nightpress.core.compress.solvers.static_weights import StaticWeight
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.anatomy import Anatomy, Inner
from nightpress.core.recipes.passes import StaticInt8

#: Rows of a token table that are kept. A lookup reads a row for each token; the rest would only make each of the many graphs large.
TOKENS = 2048
_RANGE: Range = (-4.0, 4.0)  #: of every rounded tensor; a kernel's time does not depend on it
_FACTOR = 2.0  #: of every smoothed channel; a factor of 1 would be left out


def narrowed(graph: Path, anatomy: Anatomy, heads: Sequence[int], widths: Sequence[int], *, unread: bool = True) -> Any:
    """Return a traced graph (onnx.ModelProto) with so many groups of heads and channels in each layer; 0 leaves the module out.

    unread: whether positions are computed that the answer does not read. Raises NightpressError(unsupported_architecture) if the graph's products do not have the names of the model's layers.
    """
    import onnx

    model = onnx.load(graph)
    fold_transposes(onnx, model)
    if not unread:
        without_unread_positions(model)
    edit = _Edit(onnx, model)
    for block in range(anatomy.layers):
        for inner, kept in ((anatomy.family.attention, heads[block]), (anatomy.family.feed_forward, widths[block])):
            edit.narrow(anatomy, block, inner, kept)
    edit.finish()
    return model


def in_int8(graph: Path, options: StaticInt8, top: int) -> bytes:
    """Return a graph in static int8 that takes as long as a calibrated one: codes, smoothing factors and ranges are made up.

    top: the largest code of a weight.
    """

    def settle(_name: str, weight: torch.Tensor) -> StaticWeight:
        codes, scales = codes_of(weight.numpy().T, 0, top)
        unknown = np.zeros(len(weight), np.float32)
        factors = torch.full((weight.shape[1],), _FACTOR)
        return StaticWeight(factors, codes.T, scales.reshape(-1), unknown, unknown)

    plan = QdqGraph.of(graph, options, top, settle)
    return plan.written(dict.fromkeys(plan.rounded, _RANGE), ())


class _Edit:
    def __init__(self, onnx: Any, model: Any) -> None:
        self._onnx, self._graph = onnx, model.graph
        self._constants = {constant.name: constant for constant in model.graph.initializer}
        self._products = {node.name: node for node in model.graph.node if node.op_type == "MatMul"}
        self._readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def narrow(self, anatomy: Anatomy, block: int, inner: Inner, kept: int) -> None:
        for module, parts in inner.inputs:
            columns = kept * sum(anatomy.part(part) for part in parts)
            product, added = self._layer(anatomy, block, module)
            if kept:
                self._cut(product, 1, (slice(None), slice(columns)))
                if added is not None:
                    self._cut(added, self._bias(added), (slice(columns),))
        product, added = self._layer(anatomy, block, inner.output)
        if kept:
            self._cut(product, 1, (slice(kept * anatomy.unit(inner)), slice(None)))
            return
        if added is None:
            bias = f"{product.name}.nothing"
            zeros = np.zeros(self._constants[product.input[1]].dims[1], np.float32)
            self._graph.initializer.append(self._onnx.numpy_helper.from_array(zeros, bias))
        else:
            bias = added.input[self._bias(added)]
        after = (product if added is None else added).output[0]
        for reader in self._readers[after]:
            for at, name in enumerate(reader.input):
                if name == after:
                    reader.input[at] = bias

    def finish(self) -> None:
        """Cut token tables, and take out what no output depends on any more."""
        for node in self._graph.node:
            table = self._constants.get(node.input[0]) if node.op_type == "Gather" else None
            if table is not None and node.input[1] == "input_ids" and table.dims[0] > TOKENS:
                self._cut(node, 0, (slice(TOKENS), slice(None)))
        wanted = {value.name for value in self._graph.output}
        nodes = []
        for node in reversed(self._graph.node):
            if wanted.intersection(node.output):
                nodes.append(node)
                wanted.update(node.input)
        constants = [constant for constant in self._graph.initializer if constant.name in wanted]
        del self._graph.value_info[:]  # the shapes of what is no longer so wide
        replace_all(self._graph.node, reversed(nodes))
        replace_all(self._graph.initializer, constants)

    def _layer(self, anatomy: Anatomy, block: int, module: str) -> tuple[Any, Any]:
        """The product of a linear layer, and the node that adds its bias; None: it has none."""
        end = f"{anatomy.family.blocks}.{block}.{module}"
        found = [node for name, node in self._products.items() if name == end or name.endswith(f".{end}")]
        if len(found) != 1 or found[0].input[1] not in self._constants:
            raise NightpressError(
                ErrorCode.UNSUPPORTED_ARCHITECTURE,
                f"The traced graph has {len(found)} products named {end}, so its layers can't be narrowed.",
                hint="Use `channels`, `heads` or `distill`.",
            )
        adding = (node for node in self._readers[found[0].output[0]] if node.op_type == "Add")
        return found[0], next((node for node in adding if any(name in self._constants for name in node.input)), None)

    def _bias(self, node: Any) -> int:
        """Which input of an addition is the constant."""
        return next(at for at, name in enumerate(node.input) if name in self._constants)

    def _cut(self, node: Any, at: int, part: tuple[slice, ...]) -> None:
        """Give a node a part of its constant. Equal constants of several layers are stored once, so the constant itself stays."""
        values = np.ascontiguousarray(array_of(self._onnx, self._constants[node.input[at]])[part])
        name = f"{node.name}.cut"
        self._graph.initializer.append(self._onnx.numpy_helper.from_array(values, name))
        node.input[at] = name
