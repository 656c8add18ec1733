"""Takes out of an encoder's graph what its answer does not read.

A classifier reads one position of the last layer, mostly the first. So the last layer need compute only this position: its query, its row of the
attention, and its feed-forward. Keys and values stay whole. The answers are the same, and a model of few layers takes much less time.
"""

from pathlib import Path
from typing import Any

import numpy as np

from nightpress.core.compress.graph.lists import replace_all

_UNARY = {"Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "Sqrt", "Neg", "Cast", "Identity", "Exp", "Clip", "HardSwish"}
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Where"}
_ROWS = {"LayerNormalization", "Softmax"}  #: what they compute along the last axis, they compute for each row by itself


def without_unread_positions(model: Any) -> bool:
    """Change the graph (onnx.ModelProto) in place, and return whether anything changed.

    It begins where a `Gather` selects one position of axis 1, and goes back as long as rows are computed by themselves and nothing else reads
    them. The graph needs its values' shapes (value_info).
    """
    import onnx

    edit = _Edit(onnx, model)
    changed = [edit.go_back_from(node) for node in edit.selections()]
    if any(changed):
        edit.finish()
    return any(changed)


def reads_some_positions(graph: Path) -> bool:
    """Whether `without_unread_positions` would change the graph of this file."""
    import onnx

    return without_unread_positions(onnx.load(graph))


class _Edit:
    def __init__(self, onnx: Any, model: Any) -> None:
        self._onnx, self._graph = onnx, model.graph
        self._constants = {constant.name: constant for constant in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._outputs = {value.name for value in model.graph.output}
        values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self._shapes: dict[str, tuple[int | str, ...]] = {
            value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in values
            if value.type.tensor_type.HasField("shape")
        }
        self._shapes |= {name: tuple(constant.dims) for name, constant in self._constants.items()}
        self._added: dict[int, list[Any]] = {}  #: place in the graph → nodes that go before it
        self._narrowed: set[str] = set()

    def selections(self) -> list[Any]:
        """The nodes that select one position of a tensor [B, S, H] for all texts."""
        return [
            node
            for node in self._graph.node
            if node.op_type == "Gather"
            and self._attribute(node, "axis", 0) == 1
            and len(self._shapes.get(node.input[0], ())) == 3
            and node.input[1] in self._constants
            and not self._shapes[node.input[1]]
        ]

    def go_back_from(self, selection: Any) -> bool:
        """Compute only the position that this node selects, as far back as possible. Returns whether anything could be left out."""
        nodes = list(self._graph.node)
        readers: dict[str, set[int]] = {}
        for node in nodes:
            for name in node.input:
                readers.setdefault(name, set()).add(id(node))
        #: tensor → those that want only one position of it: (reader, its input, axis of the tensor)
        claims: dict[str, list[tuple[Any, int, int]]] = {selection.input[0]: [(selection, 0, 1)]}
        narrowed: set[str] = set()
        for node in reversed(nodes):
            name = node.output[0]
            found = claims.get(name, [])
            if not found or name in self._outputs or readers[name] != {id(reader) for reader, _, _ in found}:
                continue
            axis = found[0][2]
            inputs = self._inputs(node, axis) if all(own == axis for _, _, own in found) else None
            if inputs is None:
                continue
            for at, place in inputs:
                claims.setdefault(node.input[at], []).append((node, at, place))
            if node.op_type == "Reshape":
                self._reshape(node, axis)
            narrowed.add(name)
            del claims[name]
        if not narrowed:
            return False
        self._narrowed |= narrowed
        places = {id(node): at for at, node in enumerate(nodes)}
        for name, found in claims.items():
            for axis in sorted({axis for _, _, axis in found}):
                users = [(reader, at) for reader, at, own in found if own == axis]
                self._select(name, axis, selection.input[1], users, places)
        zero = f"{selection.name}.first"
        self._constant(zero, np.asarray(0, np.int64))
        selection.input[1] = zero
        return True

    def finish(self) -> None:
        nodes = []
        for at, node in enumerate(self._graph.node):
            nodes += [*self._added.get(at, ()), node]
        nodes = [self._copy(node) for node in nodes]
        replace_all(self._graph.node, nodes)
        shapes = self._graph.value_info
        replace_all(shapes, (value for value in shapes if value.name not in self._narrowed))

    def _copy(self, node: Any) -> Any:
        copied = self._onnx.NodeProto()
        copied.CopyFrom(node)
        return copied

    # One node ---------------------------------------------------------------------------------------------------------

    def _inputs(self, node: Any, axis: int) -> list[tuple[int, int]] | None:
        """Which inputs a node reads at the one position, (input, axis), if it is to compute only this position of an axis of its output.

        None: it can't.
        """
        kind, shape = node.op_type, self._shapes.get(node.output[0])
        if shape is None or any(name and name not in self._shapes for name in node.input):
            return None
        rank = len(shape)
        if kind in _UNARY:
            return [(0, axis)]
        if kind in _ROWS:
            own = self._attribute(node, "axis", -1)
            return [(0, axis)] if axis < rank - 1 and own in {-1, rank - 1} else None
        if kind in _ELEMENTWISE:
            found = []
            for at, name in enumerate(node.input):
                place = axis - (rank - len(self._shapes[name]))
                if place >= 0 and self._shapes[name][place] != 1:
                    found.append((at, place))
            return found
        if kind == "MatMul" and axis == rank - 2 and len(self._shapes[node.input[0]]) == rank:
            return [(0, axis)]
        if kind == "Transpose":
            return [(0, list(self._attribute(node, "perm", ()))[axis])]
        if kind == "Reshape":
            before = self._shapes[node.input[0]]
            same = before[: axis + 1] == shape[: axis + 1]
            return [(0, axis)] if same and self._sizes(node) is not None else None
        return None

    def _sizes(self, node: Any) -> list[int | None] | None:
        """The entries of a Reshape's shape, None where the graph computes them. None altogether: they are not known one by one."""
        name = node.input[1]
        if name in self._constants:
            return [int(size) for size in self._values(name)]
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "Concat":
            return None
        parts = [self._values(part) if part in self._constants else None for part in maker.input]
        if len(parts) != len(self._shapes[node.output[0]]):
            return None
        return [None if part is None else int(part[0]) for part in parts]

    def _reshape(self, node: Any, axis: int) -> None:
        """Let a Reshape keep all dimensions before the axis, and have one position there."""
        sizes = self._sizes(node)
        assert sizes is not None
        behind = [-1 if size is None else size for size in sizes[axis + 1 :]]
        name = f"{node.name}.shape_at_one"
        self._constant(name, np.asarray([0] * axis + [1] + behind, np.int64))
        node.input[1] = name
        for attribute in [found for found in node.attribute if found.name == "allowzero"]:
            node.attribute.remove(attribute)  # from here on, 0 keeps a dimension

    def _select(
        self, name: str, axis: int, selected: str, users: list[tuple[Any, int]], places: dict[int, int]
    ) -> None:
        """Take the one position of a tensor that is computed whole, for these readers of it."""
        taken = f"{name}.at_{axis}"
        index = f"{selected}.row"
        self._constant(index, self._values(selected).reshape(1))
        before = min(places[id(reader)] for reader, _ in users)
        gather = self._onnx.helper.make_node("Gather", [name, index], [taken], f"{taken}.gather", axis=axis)
        self._added.setdefault(before, []).append(gather)
        for reader, at in users:
            reader.input[at] = taken

    # Constants --------------------------------------------------------------------------------------------------------

    def _values(self, name: str) -> Any:
        return np.atleast_1d(self._onnx.numpy_helper.to_array(self._constants[name]))

    def _constant(self, name: str, values: Any) -> None:
        if name not in self._constants:
            constant = self._onnx.numpy_helper.from_array(values, name)
            self._graph.initializer.append(constant)
            self._constants[name] = constant

    def _attribute(self, node: Any, name: str, default: Any) -> Any:
        found = [attribute for attribute in node.attribute if attribute.name == name]
        return self._onnx.helper.get_attribute_value(found[0]) if found else default
