"""Changes to an OpenVINO graph: compressed constants with a pass's codes, divisions merged into norms and float16 constants."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.grids.pressed_weights import Codes, PressedWeights

_FEWEST = 1024  #: weights; smaller constants stay in float32


def write_codes(model: Any, pressed: PressedWeights) -> int:
    """Replace float constants by packed weights, which are integers with scales, and return their number.

    The CPU plugin reads (code − zero point) · scale before a product as a compressed weight, and multiplies by it without unpacking.
    """
    packed = {name.removesuffix(".weight"): name for name in pressed.packed}
    replaced = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        name = packed.get(node.get_friendly_name()) or _headless(node.get_friendly_name(), packed)
        port = node.input(1)
        if name is None or port.get_source_output().get_node().get_type_name() != "Constant":
            continue
        turned = bool(node.get_attributes().get("transpose_b"))
        port.replace_source_output(_compressed(pressed.codes(name), turned=turned).output(0))
        replaced += 1
    return replaced


def _headless(name: str, packed: dict[str, str]) -> str | None:
    """Find a packed weight whose name has another prefix: a checkpoint with a head and a model loaded without its head differ there."""
    return next(
        (full for short, full in packed.items() if short.endswith(f".{name}") or name.endswith(f".{short}")), None
    )


def _compressed(weight: Codes, *, turned: bool) -> Any:
    """Make a float32 node from codes [out, in]: [out, in] if `turned`, when the product itself transposes the weight; else [in, out]."""
    from openvino import Type
    from openvino import opset13 as ops

    rows, columns = weight.codes.shape
    groups = weight.scale.shape[1]
    wide = weight.bits > 4
    top = 128 if wide else 8
    shape = [rows, groups, columns // groups]
    unsigned = (weight.codes.astype(np.int16) + top).astype(np.uint8).reshape(shape)
    zeros = np.full((rows, groups, 1), top, np.uint8)
    if weight.zero_point is not None:
        zeros = (weight.zero_point.astype(np.int16) + top).astype(np.uint8)[:, :, None]
    codes = ops.convert(_constant(unsigned, wide=wide), Type.f32)
    middle = ops.convert(_constant(zeros, wide=wide), Type.f32)
    floats = ops.multiply(ops.subtract(codes, middle), ops.constant(weight.scale[:, :, None], dtype=Type.f32))
    flat = ops.reshape(floats, ops.constant(np.array([rows, columns], np.int64)), special_zero=False)
    return flat if turned else ops.transpose(flat, ops.constant(np.array([1, 0], np.int64)))


def _constant(values: NDArray[np.uint8], *, wide: bool) -> Any:
    """Make a constant of unsigned integers: 8 bits if `wide`, else 4 bits. The first of two 4-bit integers is in a byte's low half."""
    from openvino import Tensor, Type
    from openvino import opset13 as ops

    if wide:
        return ops.constant(values, dtype=Type.u8)
    flat = values.reshape(-1)
    flat = np.pad(flat, (0, flat.size % 2))
    return ops.constant(Tensor(flat[::2] | flat[1::2] << 4, list(values.shape), Type.u4), shared_memory=False)


def divide_in_norms(model: Any) -> int:
    """Merge the division before a rounded product (`smooth_inputs`) into the scale and shift of a norm; return the number of divisions.

    The norm x̂ · γ + β also feeds the residual sum, so its own γ and β must not change. Therefore a second value x̂ · γf + βf is computed
    from the same x̂. Each of the two values then has one reader, the sum or the rounding, and the plugin fuses the value with its reader.
    Otherwise the division would be a separate pass over the data.
    """
    from openvino import opset13 as ops

    folded = 0
    for division in model.get_ordered_ops():
        readers = division.output(0).get_target_inputs() if division.get_type_name() == "Multiply" else ()
        if not readers or any(reader.get_node().get_type_name() != "FakeQuantize" for reader in readers):
            continue
        shifted, factors = _by_constant(division, "Multiply")
        scaled, beta = _by_constant(shifted, "Add")
        normed, gamma = _by_constant(scaled, "Multiply")
        if normed is None or normed.get_type_name() != "MVN":
            continue
        scale, shift = (ops.constant((constant.data * factors.data).astype(np.float32)) for constant in (gamma, beta))
        apart = ops.add(ops.multiply(normed, scale), shift, name=division.get_friendly_name())
        for reader in readers:
            reader.replace_source_output(apart.output(0))
        folded += 1
    return folded


def _by_constant(node: Any, kind: str) -> tuple[Any, Any]:
    """Return (computed input, constant input) of a node of this kind; (None, None) for any other node."""
    if node is None or node.get_type_name() != kind:
        return None, None
    given = [value.get_node() for value in node.input_values()]
    constants = [node for node in given if node.get_type_name() == "Constant"]
    computed = [node for node in given if node.get_type_name() != "Constant"]
    return (computed[0], constants[0]) if len(constants) == len(computed) == 1 else (None, None)


def halve(model: Any) -> None:
    """Store large float constants as float16. The plugin chooses the precision of the arithmetic.

    `save_model` can do this, too, but it does not change a model that has integer constants.
    """
    from openvino import Type
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != Type.f32 or node.data.size < _FEWEST:
            continue
        if np.abs(node.data).max() > np.finfo(np.float16).max:
            continue
        half = ops.constant(node.data.astype(np.float16), dtype=Type.f16, name=f"{node.get_friendly_name()}_fp16")
        floats = ops.convert(half, Type.f32)
        for user in node.output(0).get_target_inputs():
            user.replace_source_output(floats.output(0))


def settle_names(model: Any) -> None:
    """Name each unnamed node by its place in the graph.

    OpenVINO gives such nodes numbers that depend on what the process made before. The bytes of the file would depend on this, too.
    """
    for place, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}@{place}")
