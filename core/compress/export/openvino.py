"""An OpenVINO graph (model.xml, model.bin) with its tokenizer and config."""

import time
from pathlib import Path

from nightpress.core.compress.export.openvino_graph import divide_in_norms, halve, keep_cache, settle_names, write_codes
from nightpress.core.compress.graph.dynamic_int8 import quantize_openvino
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.passes import DynamicInt8

CONSUMER = Path(__file__).parents[1] / "runners" / "openvino_runner.py"
GRAPH_FILE = "model.xml"
#: Inputs that share a scale when the runtime rounds activations.
ACTIVATION_GROUP = 64


def save(
    model_dir: Path,
    out_dir: Path,
    traced: Traced,
    graph_passes: list[tuple[int, DynamicInt8]],
    *,
    weights: str = "fp32",
) -> tuple[PassRecord, ...]:
    """Write the folder. graph_passes: those passes of the recipe, with their places, that work on the graph.

    weights: `fp32`, or `fp16` to store in half the bytes what no pass has rounded.
    """
    import openvino

    # Read straight from the ONNX graph: the converter's front end would report its use over the network.
    model = openvino.Core().read_model(traced.path)
    pressed = PressedWeights(model_dir)
    if pressed.packed:
        write_codes(model, pressed)
    if weights == "fp16":
        halve(model)
    divide_in_norms(model)
    if traced.cached:
        keep_cache(model)
    records = []
    for index, options in graph_passes:
        start = time.monotonic()
        layers = quantize_openvino(model, options)
        model.set_rt_info(str(ACTIVATION_GROUP), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        records.append(
            PassRecord(
                index=index,
                name=options.pass_,
                seconds=time.monotonic() - start,
                summary={
                    "format": "openvino",
                    "matrices": len(layers),
                    "per_channel": options.per_channel,
                    "activation_group": ACTIVATION_GROUP,
                },
                layers=layers,
            )
        )
    with disk_errors():
        out_dir.mkdir(parents=True)
        copy_companions(model_dir, out_dir)
        settle_names(model)
        openvino.save_model(model, str(out_dir / GRAPH_FILE), compress_to_fp16=False)
    return tuple(records)
