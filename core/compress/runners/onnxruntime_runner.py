"""Loads model.onnx with ONNX Runtime on the CPU."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]
import numpy as np

SNIPPET = """\
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
session = onnxruntime.InferenceSession({file!r}, options, providers=["CPUExecutionProvider"])
"""

_PAST = "past_key_values."


class Forward:
    """The graph's first output for whole texts."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith(_PAST)]
        if self.past:
            self.continued = self._continued

    def __call__(self, ids: Any, mask: Any) -> Any:
        return self._run(ids, mask, None)[0]

    def _continued(self, ids: Any, mask: Any) -> Any:
        """The same output in two steps. The second step gets the first half of the text only through its keys and values."""
        half = ids.shape[1] // 2
        first, *cache = self._run(ids[:, :half], mask[:, :half], None)
        second = self._run(ids[:, half:], mask, cache)[0]
        return np.concatenate([first, second], axis=1)

    def _run(self, ids: Any, mask: Any, cache: Any) -> Any:
        feeds = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.inputs:
            feeds["token_type_ids"] = np.zeros_like(ids)
        if "position_ids" in self.inputs:
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
            feeds["position_ids"] = positions[:, -ids.shape[1] :]
        for at, name in enumerate(self.past):
            _, heads, _, width = self.inputs[name].shape
            feeds[name] = np.zeros((len(ids), heads, 0, width), np.float32) if cache is None else cache[at]
        return self.session.run(None, feeds)


def load(request: dict[str, Any]) -> tuple[Forward, dict[str, str], str]:
    snippet = SNIPPET.format(threads=request["threads"], file=f"{request['folder']}/model.onnx")
    session = measure.execute(snippet)["session"]
    import onnxruntime

    return Forward(session), {"onnxruntime": onnxruntime.__version__}, snippet


if __name__ == "__main__":
    measure.main(load)
