"""Loads model.onnx with ONNX Runtime on the CPU."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]

SNIPPET = """\
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
session = onnxruntime.InferenceSession({file!r}, options, providers=["CPUExecutionProvider"])
"""


def load(request: dict[str, Any]) -> tuple[Callable[[Any, Any], Any], dict[str, str], str]:
    snippet = SNIPPET.format(threads=request["threads"], file=f"{request['folder']}/model.onnx")
    session = measure.execute(snippet)["session"]
    import numpy as np
    import onnxruntime

    takes_types = "token_type_ids" in [one.name for one in session.get_inputs()]

    def forward(ids: Any, mask: Any) -> Any:
        feeds = {"input_ids": ids, "attention_mask": mask}
        if takes_types:
            feeds["token_type_ids"] = np.zeros_like(ids)
        return session.run(None, feeds)[0]

    return forward, {"onnxruntime": onnxruntime.__version__}, snippet


if __name__ == "__main__":
    measure.main(load)
