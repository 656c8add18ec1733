"""Dynamic int8: each runtime's graph with the integer operators of that runtime."""

import time
from pathlib import Path
from typing import Any

from nightpress.core.compress.graph.dynamic_int8 import quantize_onnx, quantize_openvino
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.passes.registry import runtime_pass
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.passes import DynamicInt8

#: Inputs that share a scale when OpenVINO rounds activations.
ACTIVATION_GROUP = 64


@runtime_pass("onnx", DynamicInt8)
def on_onnx(traced: Traced, target: Path, options: DynamicInt8, *, index: int) -> PassRecord:
    """Write the traced graph in int8 to `target`. index: the pass's index in the recipe."""
    start = time.monotonic()
    layers = quantize_onnx(
        traced.path, target, options, rounding=traced.rounding, peaks=traced.peaks, decoder=traced.cached
    )
    return PassRecord(
        index=index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={"format": "onnx", "matrices": len(layers), "per_channel": options.per_channel},
        layers=layers,
    )


@runtime_pass("openvino", DynamicInt8)
def on_openvino(model: Any, options: DynamicInt8, *, index: int) -> PassRecord:
    """Round the weights of an openvino.Model in place, and set the option by which OpenVINO rounds activations in groups at run time."""
    start = time.monotonic()
    layers = quantize_openvino(model, options)
    model.set_rt_info(str(ACTIVATION_GROUP), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return PassRecord(
        index=index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            "format": "openvino",
            "matrices": len(layers),
            "per_channel": options.per_channel,
            "activation_group": ACTIVATION_GROUP,
        },
        layers=layers,
    )
