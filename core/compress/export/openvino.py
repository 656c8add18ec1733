"""An OpenVINO graph (openvino_model.xml, openvino_model.bin) with its tokenizer and config."""

from pathlib import Path

from nightpress.core.compress.export.openvino_graph import divide_in_norms, halve, keep_cache, settle_names, write_codes
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.passes.registry import Records, RuntimePasses, runtime_pass_of

CONSUMER = Path(__file__).parents[1] / "runners" / "openvino_runner.py"
GRAPH_FILE = "openvino_model.xml"  #: the name that optimum and sentence-transformers look for


def save(model_dir: Path, out_dir: Path, traced: Traced, passes: RuntimePasses, weights: str = "fp32") -> Records:
    """Write the folder. passes: the passes of the stage `runtime`, with their indices in the recipe.

    weights: `fp32`, or `fp16` to store the weights that no pass has rounded in half the bytes.
    """
    import openvino

    # Read the ONNX graph directly: OpenVINO's converter would report its use over the network.
    model = openvino.Core().read_model(traced.path)
    pressed = PressedWeights(model_dir)
    if pressed.packed:
        write_codes(model, pressed)
    if weights == "fp16":
        halve(model)
    divide_in_norms(model)
    if traced.cached:
        keep_cache(model)
    records = tuple(runtime_pass_of(options, "openvino")(model, options, index=index) for index, options in passes)
    with disk_errors():
        out_dir.mkdir(parents=True)
        copy_companions(model_dir, out_dir)
        settle_names(model)
        openvino.save_model(model, str(out_dir / GRAPH_FILE), compress_to_fp16=False)
    return records
