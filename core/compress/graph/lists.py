"""Changes of the lists in an ONNX model: protobuf's can only be changed in place."""

from collections.abc import Iterable
from typing import Any


def replace_all(items: Any, kept: Iterable[Any]) -> None:
    """Replace the items of a list, e.g. `graph.node`. `kept` may read the list itself."""
    kept = list(kept)
    del items[:]
    items.extend(kept)


def drop_unread_constants(graph: Any) -> None:
    """Remove the initializers of an onnx.GraphProto that no node reads."""
    read = {name for node in graph.node for name in node.input}
    replace_all(graph.initializer, (constant for constant in graph.initializer if constant.name in read))
