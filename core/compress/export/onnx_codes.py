"""Write the codes that a pass chose into a graph's products: ONNX Runtime's MatMulNBits multiplies by packed weights directly."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.graph.lists import drop_unread_constants, replace_all
from nightpress.core.compress.grids.pressed_weights import Codes, PressedWeights

_DOMAIN = "com.microsoft"
_LARGEST_BLOCK, _SMALLEST_BLOCK = 128, 16  #: inputs that share a scale in MatMulNBits
#: The operator rounds the activations of each call to int8 in blocks. This makes the product fast on a CPU.
_ACCURACY_LEVEL = 4


def write_codes(model: Any, pressed: PressedWeights) -> int:
    """Replace every product with a packed weight, in place, and return their number.

    If no block size divides a weight's group size, its product stays in float.
    """
    import onnx

    constants = {initializer.name for initializer in model.graph.initializer}
    packed = {name.removesuffix(".weight"): name for name in pressed.packed}
    nodes, replaced = [], 0
    for node in model.graph.node:
        name = _named(node, packed, constants)
        size = 0 if name is None else block_size(pressed.grid(name).group_size or 0)
        if name is None or not size:
            nodes.append(node)
            continue
        arrays = pack_blocks(pressed.codes(name).in_blocks(size))
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(array, f"{name}_{key}") for key, array in arrays.items()
        )
        rows, columns = pressed.shape(name)
        product = node.output[0] if node.op_type == "MatMul" else f"{node.output[0]}_product"
        nodes.append(
            onnx.helper.make_node(
                "MatMulNBits",
                [node.input[0], *(f"{name}_{key}" for key in arrays)],
                [product],
                name=node.name,
                domain=_DOMAIN,
                K=columns,
                N=rows,
                bits=8 if pressed.grid(name).bits > 4 else 4,
                block_size=size,
                accuracy_level=_ACCURACY_LEVEL,
            )
        )
        if node.op_type == "Gemm":
            nodes.append(onnx.helper.make_node("Add", [product, node.input[2]], [node.output[0]], f"{node.name}_bias"))
        replaced += 1
    replace_all(model.graph.node, nodes)
    drop_unread_constants(model.graph)
    if all(opset.domain != _DOMAIN for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    return replaced


def block_size(group_size: int) -> int:
    """The largest block, a power of two from 16 to 128, that divides the group size, so that no block has two groups. 0: there is none."""
    size = _LARGEST_BLOCK
    while size >= _SMALLEST_BLOCK:
        if group_size % size == 0:
            return size
        size //= 2
    return 0


def pack_blocks(weight: Codes) -> dict[str, NDArray[np.generic]]:
    """Codes [out, in] → the operator's `codes` uint8 [out, blocks, bytes per block], `scales` [out, blocks] and, if asymmetric, `zeros`.

    Two codes of 4 bits share a byte, the first in the low half. Codes of other widths are stored in 4 or 8 bits. Without `zeros`, the zero
    point is 8 (or 128 for 8 bits).
    """
    rows, count = weight.scale.shape
    wide = weight.bits > 4
    middle = 128 if wide else 8
    codes = (weight.codes.astype(np.int16) + middle).astype(np.uint8).reshape(rows, count, -1)
    packed: dict[str, NDArray[np.generic]] = {
        "codes": codes if wide else codes[:, :, ::2] | codes[:, :, 1::2] << 4,
        "scales": weight.scale,
    }
    if weight.zero_point is not None:
        zeros = (weight.zero_point.astype(np.int16) + middle).astype(np.uint8)
        if not wide:
            zeros = np.pad(zeros, ((0, 0), (0, count % 2)))
            zeros = (zeros[:, ::2] | zeros[:, 1::2] << 4).astype(np.uint8)
        packed["zeros"] = zeros
    return packed


def _named(node: Any, packed: dict[str, str], constants: set[str]) -> str | None:
    """The packed weight that a product multiplies by, or None."""
    if node.op_type not in {"MatMul", "Gemm"} or node.input[1] not in constants:
        return None
    return packed.get(node.name) or next(
        # A checkpoint with a head and a model loaded without its head have different prefixes in their names.
        (full for short, full in packed.items() if short.endswith(f".{node.name}") or node.name.endswith(f".{short}")),
        None,
    )
