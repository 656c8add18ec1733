"""An ONNX graph with its tokenizer and config, as ONNX Runtime reads it."""

import shutil
import time
from pathlib import Path

from core.compress.checkpoint import disk_errors
from core.compress.executors.graph import Traced
from core.compress.executors.stream import copy_companions
from core.compress.passes.quantize_graph import quantize_onnx
from core.handoff.report import PassRecord
from core.recipes.passes import DynamicInt8

CONSUMER = Path(__file__).with_name("runners") / "onnxruntime_runner.py"
GRAPH_FILE = "model.onnx"


def save(
    model_dir: Path, out_dir: Path, traced: Traced, graph_passes: list[tuple[int, DynamicInt8]]
) -> tuple[PassRecord, ...]:
    """Write the folder. graph_passes: those passes of the recipe, with their places, that work on the graph."""
    with disk_errors():
        out_dir.mkdir(parents=True)
        copy_companions(model_dir, out_dir)
        if not graph_passes:
            for file in traced.path.parent.glob(f"{GRAPH_FILE}*"):
                shutil.copyfile(file, out_dir / file.name)
    records = []
    for index, options in graph_passes:
        start = time.monotonic()
        layers = quantize_onnx(traced.path, out_dir / GRAPH_FILE, options, rounding=traced.rounding)
        records.append(
            PassRecord(
                index=index,
                name=options.pass_,
                seconds=time.monotonic() - start,
                summary={"format": "onnx", "matrices": len(layers), "per_channel": options.per_channel},
                layers=layers,
            )
        )
    return tuple(records)
