"""Loads openvino_model.xml with OpenVINO on the CPU."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]
import numpy as np

SNIPPET = """\
import openvino

settings = {{"INFERENCE_NUM_THREADS": {threads}, "PERFORMANCE_HINT": "LATENCY"{more}}}
model = openvino.Core().compile_model({file!r}, "CPU", settings)
"""


class Forward:
    """The graph's first output for whole texts."""

    def __init__(self, model: Any, file: Path, settings: dict[str, Any]) -> None:
        self.call, self._file, self._settings = model.create_infer_request(), file, settings
        self._products: dict[str, Any] | None = None
        self.inputs = {name for port in model.inputs for name in port.names}
        if "beam_idx" in self.inputs:
            self.continued = self._continued

    def __call__(self, ids: Any, mask: Any, types: Any = None) -> Any:
        if "beam_idx" in self.inputs:
            self.call.reset_state()
        return self._run(ids, mask, types)

    def probed(self, name: str, factor: float) -> Any:
        """The answers of one product with packed weights, as `transformers_runner.OnCpu.probed`: the product, alone in a graph.

        None if the graph has no such product.
        """
        import openvino
        from openvino import opset13 as ops

        if self._products is None:
            self._graph = openvino.Core().read_model(self._file)
            self._products = {
                node.get_friendly_name(): node
                for node in self._graph.get_ordered_ops()
                if node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() != "Constant"
            }
        # A checkpoint with a head and a model loaded without its head have different prefixes in their names.
        same = (
            known
            for known in self._products
            if known == name or name.endswith(f".{known}") or known.endswith(f".{name}")
        )
        node = self._products.get(name) or self._products.get(next(same, ""))
        if node is None:
            return None
        turned, weight = bool(node.get_attributes().get("transpose_b")), node.input_value(1)
        columns = weight.get_shape()[1 if turned else 0]
        given = ops.parameter([-1, columns], openvino.Type.f32)
        product = ops.matmul(given, weight, False, turned)
        alone = openvino.Core().compile_model(openvino.Model([product], [given]), "CPU", self._settings)
        answered = np.array(alone([factor * measure.probe_vectors(columns)])[0], np.float32) / factor
        return answered[:, measure.probe_rows(answered.shape[1])]

    def _continued(self, ids: Any, mask: Any) -> Any:
        """The same output in two steps. The second step gets the first half of the text only through the model's state."""
        half = ids.shape[1] // 2
        self.call.reset_state()
        first = self._run(ids[:, :half], mask[:, :half])
        return np.concatenate([first, self._run(ids[:, half:], mask)], axis=1)

    def _run(self, ids: Any, mask: Any, types: Any = None) -> Any:
        feeds = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.inputs:
            feeds["token_type_ids"] = np.zeros_like(ids) if types is None else types
        if "position_ids" in self.inputs:
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
            feeds["position_ids"] = positions[:, -ids.shape[1] :]
        if "beam_idx" in self.inputs:
            feeds["beam_idx"] = np.arange(len(ids), dtype=np.int32)
        return np.array(self.call.infer(feeds)[0], np.float32)


def load(request: dict[str, Any]) -> tuple[Forward, dict[str, str], str]:
    # OpenVINO chooses bfloat16 if the processor has it, even if ONEDNN_MAX_CPU_ISA forbids it. Then it has no kernel for a softmax.
    more = ', "INFERENCE_PRECISION_HINT": "f32"' if request["float32"] else ""
    snippet = SNIPPET.format(threads=request["threads"], more=more, file=f"{request['folder']}/openvino_model.xml")
    loaded = measure.execute(snippet)
    import openvino

    return (
        Forward(loaded["model"], Path(request["folder"], "openvino_model.xml"), loaded["settings"]),
        {"openvino": openvino.__version__.split("-")[0]},
        snippet,
    )


if __name__ == "__main__":
    measure.main(load)
