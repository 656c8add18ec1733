"""Dynamic int8 on graphs: weights are rounded per output channel, and the runtime rounds the activations of each call."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nightpress.core.compress.graph.gemms import divide_gemms
from nightpress.core.compress.graph.lists import drop_unread_constants, replace_all
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.solvers.smooth import smoothing_factors
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import LayerEffect
from nightpress.core.recipes.linears import is_router, matches
from nightpress.core.recipes.passes import DynamicInt8
from nightpress.core.recipes.passes.base import Patterns

Weights = NDArray[np.float32]
_FEWEST = 1024  #: weights; smaller constants are biases, masks and shapes


#: Largest code of a weight. Without VNNI a processor adds two products of uint8 and int8 in 16 bits. With codes up to 127, smoothed inputs
#: would often overflow these 16 bits.
_TOP = 64
#: SmoothQuant's α: how much of the inputs' magnitude is moved into the weights.
_SMOOTHING = 0.6
#: ONNX Runtime has one scale for a whole input. A layer is sensitive if the rounding error of its input is more than this many times the
#: median layer's. Sensitive layers keep float arithmetic. They may hold at most this share of the weights.
_SENSITIVE, _SENSITIVE_SHARE = 1.5, 1 / 5


def sensitive_layers(rounding: Mapping[str, float], sizes: Mapping[str, int]) -> frozenset[str]:
    """Return the layers that lose most by one scale for a whole input, as many as the allowed share of the weights permits, worst first.

    rounding: layer → relative error of its rounded input. sizes: layer → number of weights.
    """
    known = {name: error for name, error in rounding.items() if name in sizes}
    if not known:
        return frozenset()
    median = float(np.median(list(known.values())))
    room = _SENSITIVE_SHARE * sum(sizes.values())
    chosen = set()
    for name in sorted(known, key=lambda name: (-known[name], name)):
        if known[name] > _SENSITIVE * median and sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    return frozenset(chosen)


def quantize_onnx(
    graph: Path,
    target: Path,
    options: DynamicInt8,
    *,
    rounding: Mapping[str, float],
    peaks: Mapping[str, Weights],
    decoder: bool = False,
) -> tuple[LayerEffect, ...]:
    """Quantize matrix products with ONNX Runtime's own quantizer, and embeddings row by row. Writes `target`.

    rounding, peaks: see `graph.tracing.Traced`. Sensitive layers are computed in float and only their weights are stored in int8. Weights
    that were trained on the grid of int8 (`qat`) keep their codes: they are neither smoothed nor rounded to a smaller range. A product that
    reads rows without a batch is rounded in a decoder, where the rows are tokens. In an encoder it is a head, and stays in float. Raises
    NightpressError(invalid_recipe) if nothing is left to quantize.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(graph)
    fold_transposes(onnx, model)
    if decoder:
        divide_gemms(onnx, model)
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    effects: list[LayerEffect] = []
    ignored: list[str] = []
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    sizes = {node.name: int(np.prod(constants[node.input[1]].dims)) for node in products}
    sensitive = sensitive_layers(rounding, sizes)
    taken = []
    for node in products:
        if matches(node.name, options.ignore) or matches(node.input[1], options.ignore) or is_router(node.name):
            ignored.append(node.name)
        elif len(constants[node.input[1]].dims) == 2:
            taken.append(node)
    axis = 0 if options.per_channel else None
    trained = {node.name for node in taken if lies_on_grid(array_of(onnx, constants[node.input[1]]), axis)}
    calm = [node for node in taken if node.name not in sensitive | trained and node.name in peaks]
    largest = {node.input[0]: torch.from_numpy(peaks[node.name]) for node in calm}
    smooth_inputs(onnx, model, calm, lambda x, weight: smoothing_factors(largest[x], weight, _SMOOTHING))
    for node in taken:
        weight = array_of(onnx, constants[node.input[1]])
        codes, scales = (
            codes_of(weight, 0)
            if node.name in sensitive
            else codes_of(weight, axis, 127 if node.name in trained else _TOP)
        )
        effects.append(effect_of(node.name, weight, codes * scales))
    in_float = dict.fromkeys(node.input[1] for node in products if node.name in sensitive - set(ignored))
    store_in_int8(onnx, model, {name: codes_of(array_of(onnx, constants[name]), 0) for name in in_float})
    effects += quantize_embeddings(onnx, model, constants, options.ignore)
    refuse_if_empty(effects, options.name)
    made: Any = model
    with disk_errors(), _without_advice():
        # The quantizer has one range for all weights of a call. So weights on int8's full grid need a second call, after the other weights.
        for excluded, reduce_range in ((ignored + sorted(trained), True), (ignored, False))[: 1 + bool(trained)]:
            quantize_dynamic(
                made,
                target,
                per_channel=options.per_channel,
                weight_type=QuantType.QInt8,
                reduce_range=reduce_range,
                op_types_to_quantize=["MatMul"],
                nodes_to_exclude=excluded,
                extra_options={"MatMulConstBOnly": True},
            )
            made = onnx.load(target)
    return tuple(effects)


def lies_on_grid(weight: Weights, axis: int | None) -> bool:
    """Whether rounding to int8's full range does not change a weight. Quantization-aware training leads to this; chance does not."""
    codes, scales = codes_of(weight, axis)
    return bool(weight.any()) and bool(np.allclose(codes * scales, weight, rtol=1e-5, atol=0))


def smooth_inputs(
    onnx: Any, model: Any, products: Iterable[Any], factors_of: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """Divide the products' inputs by a factor for each channel, and multiply the rows of their weights [in, out] by it, in place.

    factors_of(name of an input, weights [out, in] of all products that read it) → [in]. The channels of an input then have more similar
    ranges, so that one scale suits all of them (SmoothQuant, arXiv 2211.10438). The division is an operation of the graph. It cannot be
    merged into a weight behind an activation, or behind a norm whose output has other readers. An input whose factors are all 1 is left
    as it is.
    """
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    readers = readers_by_input(model, products)
    divisions = {}
    for name, nodes in readers.items():
        weights = [array_of(onnx, constants[node.input[1]]) for node in nodes]  # [in, out] each
        together = torch.from_numpy(np.concatenate(weights, axis=1).T)
        factors = factors_of(name, together).numpy()
        if (factors == 1).all():
            continue
        model.graph.initializer.append(numpy_helper.from_array(1 / factors, f"{name}_factors"))
        divisions[name] = helper.make_node("Mul", [name, f"{name}_factors"], [f"{name}_smooth"], f"{name}_smoothing")
        for node, weight in zip(nodes, weights, strict=True):
            node.input[0] = f"{name}_smooth"
            constants[node.input[1]].CopyFrom(numpy_helper.from_array(weight * factors[:, None], node.input[1]))
    ordered = []
    for node in model.graph.node:
        ordered += [node, *(divisions[name] for name in node.output if name in divisions)]
    replace_all(model.graph.node, ordered)


def is_smoothing(node: Any) -> bool:
    """Whether `smooth_inputs` made this node."""
    return bool(node.op_type == "Mul" and node.name.endswith("_smoothing"))


def readers_by_input(model: Any, products: Iterable[Any]) -> dict[str, list[Any]]:
    """Input → the products that read it. Products that share a weight are left out: it can't follow the factors of several inputs."""
    uses = Counter(name for node in model.graph.node for name in node.input)
    readers: dict[str, list[Any]] = {}
    for node in products:
        if uses[node.input[1]] == 1:
            readers.setdefault(node.input[0], []).append(node)
    return readers


def store_in_int8(onnx: Any, model: Any, weights: Mapping[str, tuple[NDArray[np.int8], Weights]]) -> None:
    """Replace weights by codes [in, out] and scales [1, out]. The runtime dequantizes them once, when it loads the graph."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    floats = []
    for name, (codes, scales) in weights.items():
        constants[name].CopyFrom(numpy_helper.from_array(codes, f"{name}_int8"))
        model.graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scale"))
        floats += [
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_float"], f"{name}_cast", to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_float", f"{name}_scale"], [name], f"{name}_mul"),
        ]
    replace_all(model.graph.node, [*floats, *model.graph.node])


def fold_transposes(onnx: Any, model: Any) -> None:
    """Replace each Transpose of a constant by the transposed constant.

    A weight that is tied to an embedding table reaches its product through a Transpose, where the quantizer finds no constant.
    """
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        table = constants.get(node.input[0]) if node.op_type == "Transpose" else None
        if table is None or len(table.dims) != 2:
            kept.append(node)
            continue
        turned = onnx.numpy_helper.from_array(np.ascontiguousarray(array_of(onnx, table).T), node.output[0])
        model.graph.initializer.append(turned)
    replace_all(model.graph.node, kept)


def quantize_embeddings(onnx: Any, model: Any, constants: dict[str, Any], ignore: Patterns) -> list[LayerEffect]:
    """Replace Gather(table) by Gather(int8 table) · Gather(scales), with one scale for each row. Returns the rounding errors.

    The runtime's quantizer would use one scale for a whole table, which costs fidelity.
    """
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    effects, nodes, done = [], [], set()
    for node in model.graph.node:
        table = constants.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type != onnx.TensorProto.FLOAT or len(table.dims) != 2:
            nodes.append(node)
            continue
        weight = array_of(onnx, table)
        if weight.size < _FEWEST or matches(node.name, ignore) or matches(table.name, ignore):
            nodes.append(node)
            continue
        codes, scales = quantize_rows(weight)
        if table.name not in done:
            done.add(table.name)
            model.graph.initializer.append(numpy_helper.from_array(codes, f"{table.name}_int8"))
            model.graph.initializer.append(numpy_helper.from_array(scales, f"{table.name}_scale"))
            effects.append(effect_of(node.name, weight, codes * scales))
        out = node.output[0]
        nodes += [
            helper.make_node("Gather", [f"{table.name}_int8", node.input[1]], [f"{out}_int8"], name=node.name, axis=0),
            helper.make_node("Gather", [f"{table.name}_scale", node.input[1]], [f"{out}_scale"], f"{node.name}_scale"),
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], f"{node.name}_cast", to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out], f"{node.name}_mul"),
        ]
    replace_all(model.graph.node, nodes)
    drop_unread_constants(model.graph)
    return effects


def quantize_openvino(model: Any, options: DynamicInt8) -> tuple[LayerEffect, ...]:
    """Replace the constants of matrix products and embeddings by Multiply(Convert(int8), scale), in place. Returns the rounding errors.

    OpenVINO's CPU plugin reads this form as compressed weights. If the processor supports it, the plugin rounds activations in groups and
    multiplies in int8. Otherwise it unpacks the weights to float. Raises NightpressError(invalid_recipe) if nothing is left to quantize.
    """
    from openvino import Type
    from openvino import opset13 as ops

    effects = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in {"MatMul", "Gather"}:
            continue
        port = node.input(1 if kind == "MatMul" else 0)
        constant, turned = port.get_source_output().get_node(), False
        if kind == "MatMul" and constant.get_type_name() == "Transpose":  # a weight tied to an embedding table
            constant, turned = constant.input_value(0).get_node(), True
        if constant.get_type_name() != "Constant" or constant.get_element_type() != Type.f32:
            continue
        weight: Weights = np.ascontiguousarray(constant.data.T) if turned else constant.data
        name = node.get_friendly_name()
        if weight.ndim != 2 or weight.size < _FEWEST:
            continue
        if matches(name, options.ignore) or matches(constant.get_friendly_name(), options.ignore) or is_router(name):
            continue
        # One scale for each output channel: a row of an embedding table or of a transposed weight, else a column.
        by_row = kind == "Gather" or bool(node.get_attributes().get("transpose_b"))
        axis = None if not options.per_channel else (1 if by_row else 0)
        codes, scales = codes_of(weight, axis)
        packed = ops.constant(codes, dtype=Type.i8, name=f"{constant.get_friendly_name()}_int8")
        floats = ops.multiply(ops.convert(packed, Type.f32), ops.constant(scales, dtype=Type.f32))
        port.replace_source_output(floats.output(0))
        effects.append(effect_of(name, weight, codes * scales))
    refuse_if_empty(effects, options.name)
    return tuple(effects)


def quantize_rows(weight: Weights) -> tuple[NDArray[np.int8], Weights]:
    """Weight [R, C] → codes int8 [R, C] in −127 … 127 and scales [R, 1]."""
    return codes_of(weight, 1)


def codes_of(weight: Weights, axis: int | None, top: int = 127) -> tuple[NDArray[np.int8], Weights]:
    """Round to the symmetric grid −top … top, with one scale along `axis`, or one scale in total (None). Returns codes and scales.

    Raises NightpressError(numerical_failure) on NaN or infinity.
    """
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    if not np.isfinite(largest).all():
        raise NightpressError(
            ErrorCode.NUMERICAL_FAILURE, "A weight of the graph is not finite.", hint="Check the model's weights."
        )
    scales = np.where(largest > 0, largest / top, 1).astype(np.float32)
    return np.clip(np.rint(weight / scales), -top, top).astype(np.int8), scales


def array_of(onnx: Any, tensor: Any) -> Weights:
    values: Weights = onnx.numpy_helper.to_array(tensor)
    return values


def effect_of(name: str, before: Weights, after: Weights) -> LayerEffect:
    norm = float(np.linalg.norm(before.astype(np.float64)))  # squares of large weights overflow float32
    error = float(np.linalg.norm(before.astype(np.float64) - after)) / norm if norm else 0.0
    return LayerEffect(name=name, bytes_before=before.nbytes, bytes_after=before.size, relative_error=error)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Drop the quantizer's advice to optimise the graph first, which it writes to the root logger: the exporter has done this."""

    def drop(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.getMessage()

    logging.getLogger().addFilter(drop)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(drop)


def refuse_if_empty(effects: Iterable[object], name: str) -> None:
    if not list(effects):
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"`{name}` would change nothing: `ignore` leaves no matrix of this graph.",
            hint="Narrow `ignore`.",
        )
