"""Traces a tiny model into graphs in dynamic int8, runs them, and compares them with the model."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.export import onnx, openvino
from nightpress.core.compress.graph.samples import session
from nightpress.core.compress.graph.tracing import trace
from nightpress.core.compress.passes import PassContext
from nightpress.core.compress.runners.encoder_decoder import decoder_feeds
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import PassOptions

_STEPS = 6  #: tokens that a decoder reads, one by one


def graph_distance(format_: str, header: ModelHeader, source: Path, work: Path, options: PassOptions) -> float:
    """Return the relative distance of the graphs' outputs from the model's, for two texts, images or sounds."""
    check = examples(header)
    traces = source.parent / "traces"  # both formats find the same
    traces.mkdir(exist_ok=True)
    work.mkdir(parents=True)
    context = PassContext(header=header, work_dir=traces)
    traced = trace(source, header, check, context)
    exporter: Any = onnx if format_ == "onnx" else openvino
    exporter.save(source, work / "out", traced, [(0, options)], weights="fp32")
    if traced.encoder is not None:
        found = (_pair_in_onnxruntime if format_ == "onnx" else _pair_in_openvino)(work / "out", check)
    else:
        found = (in_onnxruntime if format_ == "onnx" else _in_openvino)(work / "out", check.ids)
    return float(np.linalg.norm(found - traced.check) / np.linalg.norm(traced.check))


def examples(header: ModelHeader) -> Sequences:
    random = np.random.default_rng(1)
    read = random.integers(5, 50, (2, _STEPS)) if header.task == "seq2seq" else None
    if header.sees_images or header.hears:
        shape = header.pixels if header.sees_images else header.features
        return Sequences(
            random.standard_normal((2, *shape)).astype(np.float32), np.ones((2, 1), np.int64), decoder=read
        )
    ids = random.integers(5, 50, (2, 24))
    return Sequences(ids, np.ones_like(ids), decoder=read)


def _feeds(ids: NDArray[Any]) -> dict[str, NDArray[Any]]:
    if ids.ndim == 4:
        return {"pixel_values": ids}
    if ids.ndim == 3:
        return {"input_features": ids}
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
        "beam_idx": np.arange(len(ids), dtype=np.int32),
    }


def in_onnxruntime(folder: Path, ids: NDArray[Any]) -> NDArray[np.float32]:
    loaded = session(folder / "model.onnx", 1)
    given: dict[str, Any] = {}
    for value in loaded.get_inputs():
        known = _feeds(ids).get(value.name)
        given[value.name] = (
            np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32) if known is None else known
        )
    out: NDArray[np.float32] = loaded.run(None, given)[0]
    return out


def _pair_in_onnxruntime(folder: Path, check: Sequences) -> NDArray[np.float32]:
    assert check.decoder is not None
    encoder, decoder = (session(folder / f"{name}.onnx", 1) for name in ("encoder_model", "decoder_model_merged"))
    names = {value.name for value in encoder.get_inputs()}
    hidden = encoder.run(None, {name: value for name, value in _feeds(check.ids).items() if name in names})[0]
    shapes, cache, found = {value.name: value.shape for value in decoder.get_inputs()}, None, []
    for at in range(_STEPS):
        logits, *cache = decoder.run(
            None, decoder_feeds(shapes, check.decoder[:, at : at + 1], hidden, check.mask, cache)
        )
        found.append(logits)
    return np.concatenate(found, axis=1)


def _in_openvino(folder: Path, ids: NDArray[Any]) -> NDArray[np.float32]:
    request, names = _opened(folder / "openvino_model.xml")
    out: NDArray[np.float32] = request.infer({name: value for name, value in _feeds(ids).items() if name in names})[0]
    return out


def _pair_in_openvino(folder: Path, check: Sequences) -> NDArray[np.float32]:
    assert check.decoder is not None
    (encoder, given), (decoder, names) = (
        _opened(folder / f"openvino_{part}_model.xml") for part in ("encoder", "decoder")
    )
    feeds = {name: value for name, value in _feeds(check.ids).items() if name in given}
    fixed: dict[str, Any] = {
        "encoder_hidden_states": np.array(encoder.infer(feeds)[0]),
        "encoder_attention_mask": check.mask,
        "beam_idx": np.arange(2, dtype=np.int32),
    }
    found = []
    for at in range(_STEPS):
        step = fixed | {"input_ids": check.decoder[:, at : at + 1]}
        found.append(np.array(decoder.infer({name: value for name, value in step.items() if name in names})[0]))
    return np.concatenate(found, axis=1)


def _opened(file: Path) -> tuple[Any, set[str]]:
    import openvino as runtime

    model = runtime.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model.create_infer_request(), {name for port in model.inputs for name in port.names}
