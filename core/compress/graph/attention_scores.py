"""Find the products of queries and keys in a graph, and the tensors where queries and keys are computed."""

from dataclasses import dataclass
from typing import Any

_LAYOUT = {"Transpose", "Reshape", "Squeeze", "Unsqueeze"}  #: operations that move values and do not change them
_TO_SOFTMAX = {"Mul", "Div", "Add", "Where"}  #: operations that may stand between scores and their softmax
_FARTHEST = 4  #: largest number of such operations


@dataclass(frozen=True)
class Operand:
    """The queries or the keys of a product, before they are split into heads and transposed."""

    tensor: str
    reader: str  #: the node that reads this tensor on its way to the product


@dataclass(frozen=True)
class Scores:
    query: Operand
    key: Operand


def score_products(graph: Any) -> dict[str, Scores]:
    """The products of an ONNX graph whose results go to a softmax: node's name → its queries and keys."""
    made_by = {out: node for node in graph.node for out in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def origin(name: str, reader: Any) -> Operand:
        """Go back over operations that only move values, as long as no other node reads the tensors in between."""
        while name in made_by and made_by[name].op_type in _LAYOUT and len(readers[name]) == 1:
            reader = made_by[name]
            name = reader.input[0]
        return Operand(name, reader.name)

    def reaches_softmax(name: str, steps: int = _FARTHEST) -> bool:
        return any(
            node.op_type == "Softmax"
            or (steps > 0 and node.op_type in _TO_SOFTMAX and reaches_softmax(node.output[0], steps - 1))
            for node in readers.get(name, ())
        )

    return {
        node.name: Scores(origin(node.input[0], node), origin(node.input[1], node))
        for node in graph.node
        if node.op_type == "MatMul" and all(name in made_by for name in node.input) and reaches_softmax(node.output[0])
    }
