"""Loads model.onnx with ONNX Runtime on the CPU; of an encoder-decoder, encoder_model.onnx and decoder_model_merged.onnx."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import encoder_decoder  # type: ignore[import-not-found]
import measure  # type: ignore[import-not-found]
import numpy as np

SNIPPET = """\
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
session = onnxruntime.InferenceSession({file!r}, options, providers=["CPUExecutionProvider"])
"""

_PAIR_SNIPPET = """\
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
encoder, decoder = (
    onnxruntime.InferenceSession(f"{folder}/{{name}}.onnx", options, providers=["CPUExecutionProvider"])
    for name in ("encoder_model", "decoder_model_merged")
)
"""


class Forward:
    """The graph's first output for whole texts."""

    def __init__(self, session: Any, file: Path) -> None:
        self.session, self._products = session, Products(file)
        self.shapes = {value.name: value.shape for value in session.get_inputs()}
        if encoder_decoder.past_inputs(self.shapes):
            self.continued = self._continued

    def __call__(self, ids: Any, mask: Any, types: Any = None) -> Any:
        if ids.ndim == 4:
            return self.session.run(None, {"pixel_values": ids})[0]
        return self._run(ids, mask, None, types)[0]

    def probed(self, name: str, factor: float) -> Any:
        return self._products.probed(name, factor)

    def _continued(self, ids: Any, mask: Any) -> Any:
        """The same output in two steps. The second step gets the first half of the text only through its keys and values."""
        half = ids.shape[1] // 2
        first, *cache = self._run(ids[:, :half], mask[:, :half], None)
        second = self._run(ids[:, half:], mask, cache)[0]
        return np.concatenate([first, second], axis=1)

    def _run(self, ids: Any, mask: Any, cache: Any, types: Any = None) -> Any:
        feeds = measure.text_feeds(self.shapes, ids, mask, types)
        return self.session.run(None, feeds | encoder_decoder.past_feeds(self.shapes, len(ids), cache))


class Pair:
    """The graphs of an encoder-decoder. The cache is the decoder's list of further outputs."""

    def __init__(self, encoder: Any, decoder: Any, folder: Path) -> None:
        self._encoder, self._decoder = encoder, decoder
        self._given = [value.name for value in encoder.get_inputs()]
        self._shapes = {value.name: value.shape for value in decoder.get_inputs()}
        self.products = [Products(folder / f"{name}.onnx") for name in ("encoder_model", "decoder_model_merged")]

    def encode(self, given: Any, mask: Any) -> Any:
        return self._encoder.run(None, dict(zip(self._given, (given, mask), strict=False)))[0]

    def decode(self, tokens: Any, hidden: Any, mask: Any, cache: Any) -> tuple[Any, Any]:
        feeds = encoder_decoder.decoder_feeds(self._shapes, tokens, hidden, mask, cache)
        logits, *cache = self._decoder.run(None, feeds)
        return logits, cache


class Products:
    """The products with packed weights of a graph's file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._graph: Any = None

    def probed(self, name: str, factor: float) -> Any:
        """The answers of one product with packed weights, as `transformers_runner.OnCpu.probed`: its node, alone in a graph.

        None if the graph has no such node: a layer whose groups no block divides stays in float.
        """
        import onnx

        if self._graph is None:
            self._graph = onnx.load(self._file, load_external_data=False).graph
        codes = f"{name}.weight_codes"
        node = next((node for node in self._graph.node if codes in node.input), None)
        if node is None:
            return None
        constants = [each for each in self._graph.initializer if each.name in node.input]
        for constant in constants:
            if onnx.external_data_helper.uses_external_data(constant):
                onnx.external_data_helper.load_external_data_for_tensor(constant, str(self._file.parent))
        columns = next(attribute.i for attribute in node.attribute if attribute.name == "K")
        floats = onnx.TensorProto.FLOAT
        ends = [
            [onnx.helper.make_tensor_value_info(end, floats, [None, None])] for end in (node.input[0], node.output[0])
        ]
        alone = onnx.helper.make_model(
            onnx.helper.make_graph([node], "layer", *ends, initializer=constants),
            opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(node.domain, 1)],
            ir_version=10,
        )
        import onnxruntime

        session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
        answered = session.run(None, {node.input[0]: factor * measure.probe_vectors(columns)})[0] / factor
        return answered[:, measure.probe_rows(answered.shape[1])]


def load(request: dict[str, Any]) -> tuple[Any, ...]:
    if request["task"] == "seq2seq":
        return _load_pair(request)
    snippet = SNIPPET.format(threads=request["threads"], file=f"{request['folder']}/model.onnx")
    session = measure.execute(snippet)["session"]
    import onnxruntime

    return Forward(session, Path(request["folder"], "model.onnx")), {"onnxruntime": onnxruntime.__version__}, snippet


def _load_pair(request: dict[str, Any]) -> tuple[Any, ...]:
    snippet = _PAIR_SNIPPET.format(threads=request["threads"], folder=request["folder"])
    loaded = measure.execute(snippet)
    import onnxruntime

    pair = Pair(loaded["encoder"], loaded["decoder"], Path(request["folder"]))
    forward = encoder_decoder.Forward(pair, request)
    return forward, {"onnxruntime": onnxruntime.__version__}, snippet, forward.generate, forward.waits


if __name__ == "__main__":
    measure.main(load)
