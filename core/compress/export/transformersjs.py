"""An ONNX graph in the folders that transformers.js expects, in a web page or in Node: onnx/model_quantized.onnx, config and tokenizer."""

import json
from pathlib import Path

from nightpress.core.compress.export import onnx
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.model.checkpoint import write_json
from nightpress.core.compress.passes.registry import Records, RuntimePasses
from nightpress.core.errors import ErrorCode, NightpressError

CONSUMER = Path(__file__).parents[1] / "runners" / "transformersjs_runner.py"
#: transformers.js's name of a number type → suffix of the file's name.
_SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}
_INTEGERS = frozenset({"MatMulInteger", "DynamicQuantizeMatMul", "DequantizeLinear"})


def save(model_dir: Path, out_dir: Path, traced: Traced, passes: RuntimePasses, weights: str = "fp32") -> Records:
    """Write the folder. `onnx.save` makes the graph and has the same arguments.

    Raises NightpressError(invalid_recipe) if the graph is too large for a web page.
    """
    records = onnx.save(model_dir, out_dir, traced, passes, weights)
    graph = out_dir / onnx.GRAPH_FILE
    if graph.with_name(f"{onnx.GRAPH_FILE}.data").exists():
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            "The graph is larger than the 2 GB that a page can load.",
            hint="Add a pass that makes it smaller, or export `onnx`.",
        )
    kind = _number_type(graph, weights)
    (out_dir / "onnx").mkdir()
    graph.rename(out_dir / "onnx" / f"model{_SUFFIXES[kind]}.onnx")
    config = json.loads((out_dir / "config.json").read_bytes())
    # The graph has the codes. The loader would refuse a config that it doesn't know.
    config.pop("quantization_config", None)
    config["transformers.js_config"] = {"dtype": kind}  # the default, so that a page need not name a number type
    write_json(out_dir / "config.json", config)
    return tuple(
        record.model_copy(update={"summary": record.summary | {"format": "transformers.js"}}) for record in records
    )


def _number_type(graph: Path, weights: str) -> str:
    """transformers.js's name for a graph's number type."""
    import onnx as library

    operations = {node.op_type: node for node in library.load(graph).graph.node}
    if product := operations.get("MatMulNBits"):
        return "q4" if any(attribute.name == "bits" and attribute.i == 4 for attribute in product.attribute) else "q8"
    return "q8" if operations.keys() & _INTEGERS else weights
