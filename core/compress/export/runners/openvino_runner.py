"""Loads model.xml with OpenVINO on the CPU."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]

SNIPPET = """\
import openvino

settings = {{"INFERENCE_NUM_THREADS": {threads}, "PERFORMANCE_HINT": "LATENCY"}}
model = openvino.Core().compile_model({file!r}, "CPU", settings)
"""


def load(request: dict[str, Any]) -> tuple[Callable[[Any, Any], Any], dict[str, str], str]:
    snippet = SNIPPET.format(threads=request["threads"], file=f"{request['folder']}/model.xml")
    model = measure.execute(snippet)["model"]
    import numpy as np
    import openvino

    takes_types = any("token_type_ids" in port.names for port in model.inputs)
    call = model.create_infer_request()

    def forward(ids: Any, mask: Any) -> Any:
        feeds = {"input_ids": ids, "attention_mask": mask}
        if takes_types:
            feeds["token_type_ids"] = np.zeros_like(ids)
        return np.array(call.infer(feeds)[0], np.float32)

    return forward, {"openvino": openvino.__version__.split("-")[0]}, snippet


if __name__ == "__main__":
    measure.main(load)
