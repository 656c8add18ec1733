"""An OpenVINO graph (openvino_model.xml, openvino_model.bin) with its tokenizer and config.

An encoder-decoder is two: openvino_encoder_model.xml, and openvino_decoder_model.xml, which keeps its cache between calls.
"""

from pathlib import Path
from typing import Any

from nightpress.core.compress.export.openvino_graph import divide_in_norms, halve, settle_names, write_codes
from nightpress.core.compress.export.openvino_state import keep_cache, keep_heard
from nightpress.core.compress.graph.modules import DECODER, ENCODER, MODEL
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.passes.registry import Records, RuntimePasses, runtime_pass_of, together
from nightpress.core.handoff.report import PassRecord

CONSUMER = Path(__file__).parents[1] / "runners" / "openvino_runner.py"
GRAPH_FILE = "openvino_model.xml"
#: The names that optimum, sentence-transformers and OpenVINO's generation libraries look for.
FILES = {
    MODEL: GRAPH_FILE,
    ENCODER: "openvino_encoder_model.xml",
    DECODER: "openvino_decoder_model.xml",
}


def save(model_dir: Path, out_dir: Path, traced: Traced, passes: RuntimePasses, weights: str = "fp32") -> Records:
    """Write the folder. passes: the passes of the stage `runtime`, with their indices in the recipe.

    weights: `fp32`, or `fp16` to store the weights that no pass has rounded in half the bytes.
    """
    import openvino

    pressed = PressedWeights(model_dir)
    copy_companions(model_dir, out_dir)
    records: list[PassRecord] = []
    for name, graph in traced.graphs.items():
        model = _model(graph, name, pressed, weights, cached=traced.cached)
        done = [runtime_pass_of(options, "openvino")(model, options, index=index) for index, options in passes]
        records = together(records, done)
        with disk_errors():
            settle_names(model)
            openvino.save_model(model, str(out_dir / FILES[name]), compress_to_fp16=False)
    return tuple(records)


def _model(graph: Path, name: str, pressed: PressedWeights, weights: str, *, cached: bool) -> Any:
    """Read an ONNX graph as an openvino.Model, and make it the form that OpenVINO runs best."""
    import openvino

    # Read the ONNX graph directly: OpenVINO's converter would report its use over the network.
    model = openvino.Core().read_model(graph)
    if pressed.packed:
        write_codes(model, pressed)
    if weights == "fp16":
        halve(model)
    divide_in_norms(model)
    if cached or name == DECODER:
        keep_cache(model)
    if name == DECODER:
        keep_heard(model)
    return model
