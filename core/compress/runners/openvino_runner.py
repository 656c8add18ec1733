"""Loads openvino_model.xml with OpenVINO on the CPU; of an encoder-decoder, openvino_encoder_model.xml and openvino_decoder_model.xml."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import encoder_decoder  # type: ignore[import-not-found]
import measure  # type: ignore[import-not-found]
import numpy as np

SNIPPET = """\
import openvino

settings = {{"INFERENCE_NUM_THREADS": {threads}, "PERFORMANCE_HINT": "LATENCY"{more}}}
model = openvino.Core().compile_model({file!r}, "CPU", settings)
"""

_PAIR_SNIPPET = """\
import openvino

settings = {{"INFERENCE_NUM_THREADS": {threads}, "PERFORMANCE_HINT": "LATENCY"{more}}}
encoder, decoder = (
    openvino.Core().compile_model(f"{folder}/{{name}}.xml", "CPU", settings)
    for name in ("openvino_encoder_model", "openvino_decoder_model")
)
"""


class Forward:
    """The graph's first output for whole texts."""

    def __init__(self, model: Any, file: Path, settings: dict[str, Any]) -> None:
        self.call, self._products = model.create_infer_request(), Products(file, settings)
        self.inputs = {name for port in model.inputs for name in port.names}
        if "beam_idx" in self.inputs:
            self.continued = self._continued

    def __call__(self, ids: Any, mask: Any, types: Any = None) -> Any:
        if "beam_idx" in self.inputs:
            self.call.reset_state()
        if ids.ndim == 4:
            return np.array(self.call.infer({"pixel_values": ids})[0], np.float32)
        return self._run(ids, mask, types)

    def probed(self, name: str, factor: float) -> Any:
        return self._products.probed(name, factor)

    def _continued(self, ids: Any, mask: Any) -> Any:
        """The same output in two steps. The second step gets the first half of the text only through the model's state."""
        half = ids.shape[1] // 2
        self.call.reset_state()
        first = self._run(ids[:, :half], mask[:, :half])
        return np.concatenate([first, self._run(ids[:, half:], mask)], axis=1)

    def _run(self, ids: Any, mask: Any, types: Any = None) -> Any:
        feeds = measure.text_feeds(self.inputs, ids, mask, types)
        if "beam_idx" in self.inputs:
            feeds["beam_idx"] = np.arange(len(ids), dtype=np.int32)
        return np.array(self.call.infer(feeds)[0], np.float32)


class Pair:
    """The graphs of an encoder-decoder. The decoder's cache is the state of its request, so it belongs to one text at a time."""

    def __init__(self, encoder: Any, decoder: Any, folder: Path, settings: dict[str, Any]) -> None:
        self._encoder, self._decoder = encoder.create_infer_request(), decoder.create_infer_request()
        self._given = [port.get_any_name() for port in encoder.inputs]
        self._inputs = {name for port in decoder.inputs for name in port.names}
        names = ("openvino_encoder_model", "openvino_decoder_model")
        self.products = [Products(folder / f"{name}.xml", settings) for name in names]

    def encode(self, given: Any, mask: Any) -> Any:
        feeds = dict(zip(self._given, (given, mask), strict=False))
        return np.array(self._encoder.infer(feeds)[0], np.float32)

    def decode(self, tokens: Any, hidden: Any, mask: Any, cache: Any) -> tuple[Any, Any]:
        if cache is None:
            self._decoder.reset_state()
        feeds = {
            "input_ids": tokens,
            "encoder_hidden_states": hidden,
            "encoder_attention_mask": mask,
            "beam_idx": np.arange(len(tokens), dtype=np.int32),
        }
        found = self._decoder.infer({name: value for name, value in feeds.items() if name in self._inputs})
        return np.array(found[0], np.float32), True


class Products:
    """The products with packed weights of a graph's file."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file, self._settings = file, settings
        self._products: dict[str, Any] | None = None

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


def load(request: dict[str, Any]) -> tuple[Any, ...]:
    # OpenVINO chooses bfloat16 if the processor has it, even if ONEDNN_MAX_CPU_ISA forbids it. Then it has no kernel for a softmax.
    more = ', "INFERENCE_PRECISION_HINT": "f32"' if request["float32"] else ""
    if request["task"] == "seq2seq":
        return _load_pair(request, more)
    snippet = SNIPPET.format(threads=request["threads"], more=more, file=f"{request['folder']}/openvino_model.xml")
    loaded = measure.execute(snippet)
    import openvino

    return (
        Forward(loaded["model"], Path(request["folder"], "openvino_model.xml"), loaded["settings"]),
        {"openvino": openvino.__version__.split("-")[0]},
        snippet,
    )


def _load_pair(request: dict[str, Any], more: str) -> tuple[Any, ...]:
    snippet = _PAIR_SNIPPET.format(threads=request["threads"], more=more, folder=request["folder"])
    loaded = measure.execute(snippet)
    import openvino

    pair = Pair(loaded["encoder"], loaded["decoder"], Path(request["folder"]), loaded["settings"])
    forward = encoder_decoder.Forward(pair, request)
    versions = {"openvino": openvino.__version__.split("-")[0]}
    return forward, versions, snippet, forward.generate, forward.waits


if __name__ == "__main__":
    measure.main(load)
