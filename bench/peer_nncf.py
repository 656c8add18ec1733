"""Runs NNCF's quantization with accuracy control for bench.within, in the peer's own environment. It imports none of our code.

PYTHON bench/peer_nncf.py GRAPH.onnx DATA.npz DROP THREADS OUT

DATA.npz holds token ids and masks to calibrate with, rows that choose with their labels, whether the source is right on each of them, and the
draws of the bootstrap. The metric is the lower end of the accuracy's relative change from the source: that of bench.within. Writes the graph to
OUT, and prints as JSON the seconds and how many graphs were measured.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino


def main() -> None:
    graph, data, drop, threads, out = sys.argv[1:6]
    import nncf

    arrays = dict(np.load(data))
    model = openvino.Core().read_model(graph)
    names = {name for port in model.inputs for name in port.names}
    asked = 0

    def feeds(ids: Any, mask: Any) -> dict[str, Any]:
        whole = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return {name: array for name, array in whole.items() if name in names}

    def rows(kind: str) -> list[dict[str, Any]]:
        pairs = zip(arrays[f"{kind}_ids"], arrays[f"{kind}_mask"], strict=True)
        return [feeds(ids[None], mask[None]) for ids, mask in pairs]

    def validate(compiled: Any, dataset: Any) -> tuple[float, list[float]]:
        nonlocal asked
        asked += 1
        hits = []
        for at, row in dataset:
            answer = np.asarray(compiled(row)[0])[0].argmax()
            hits.append(float(answer == arrays["labels"][at]))
        if len(hits) < len(arrays["labels"]):  # a part of the rows, to rank the layers on
            return float(np.mean(hits)), hits
        return lower_end(np.asarray(hits), arrays["source_hits"], arrays["times"]), hits

    calibration = nncf.Dataset(rows("calibration"))
    chosen = nncf.Dataset(list(enumerate(rows("choose"))))
    source_end = lower_end(arrays["source_hits"], arrays["source_hits"], arrays["times"])
    started = time.monotonic()
    quantized = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=calibration,
        validation_dataset=chosen,
        validation_fn=validate,
        max_drop=source_end + float(drop),
        drop_type=nncf.DropType.ABSOLUTE,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(arrays["calibration_ids"]),
    )
    seconds = time.monotonic() - started
    openvino.save_model(quantized, str(Path(out, "model.xml")), compress_to_fp16=False)
    print(json.dumps({"seconds": seconds, "measured": asked, "threads": int(threads)}))


def lower_end(ours: Any, theirs: Any, times: Any) -> float:
    """The lower end of the 95% interval of the relative change. times [R, N + 2]: how often each example is drawn, two added ones at the end."""
    mine = times @ np.append(ours, [1.0, 0.0])
    base = times @ np.append(theirs, [0.0, 1.0])
    low = float(np.percentile(mine / base - 1, 2.5))
    return min(low, float(ours.mean() / theirs.mean() - 1))


if __name__ == "__main__":
    main()
