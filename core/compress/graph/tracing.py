"""The graph executor: trace a model once into an ONNX graph, from which every graph format is made.

The trace is the resume point. It takes most of the time, and another attempt of the same job finds it in the job's work folder.
"""

import ast
import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.graph.experts import spread_experts
from nightpress.core.compress.graph.modules import (
    DECODER,
    ENCODER,
    MODEL,
    EncoderDecoder,
    FirstOutput,
    Sees,
    Signature,
    Whole,
    WithCache,
    takes_types,
)
from nightpress.core.compress.graph.restated import restate
from nightpress.core.compress.graph.telling import telling
from nightpress.core.compress.graph.unread import without_unread_positions
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.model.networks import load_model
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import describe_folder
from nightpress.core.recipes.anatomy import OWN_SHAPES
from nightpress.core.recipes.header import ModelHeader

OPSET = 20  #: the first with Gelu as one node; ONNX Runtime reads it since 1.17, OpenVINO since 2024.0


@dataclass(frozen=True)
class Traced:
    """A model as an fp32 ONNX graph, with the outputs of the traced model itself for a few check texts."""

    path: Path  #: of an encoder-decoder, its decoder's graph
    check: NDArray[np.float32]  #: the model's first output for the check texts: [B, S, …] or [B, C]
    #: linear layer → relative error of its input on the check texts, rounded to 8 bits with one scale
    rounding: Mapping[str, float]
    #: linear layer → largest magnitude of each input channel on the check texts, [in]
    peaks: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    cached: bool = False  #: the graph reads and returns a key/value cache: it is a decoder's
    encoder: Path | None = None  #: of an encoder-decoder, its encoder's graph

    @property
    def graphs(self) -> Mapping[str, Path]:
        """The graphs by their names: that of the model, or those of encoder and decoder."""
        return {MODEL: self.path} if self.encoder is None else {ENCODER: self.encoder, DECODER: self.path}


def trace(model_dir: Path, header: ModelHeader, check: Sequences, context: PassContext) -> Traced:
    """Trace a model, or find the trace of an earlier attempt.

    Attempts have folders with different names. So the trace is found by a hash of the model's files, its header and the check texts.
    """
    context.progress(0.0, "looking for an earlier trace of this model")
    key = hashlib.sha256(f"{content_digest(model_dir)}\n{header.model_dump_json()}\n{OPSET}\n".encode())
    for part in (check.ids, check.types, check.decoder):
        if part is not None:
            key.update(part.tobytes())
    folder = context.work_dir / "graph" / key.hexdigest()[:16]
    names = (ENCODER, DECODER) if header.task == "seq2seq" else (MODEL,)
    graphs, outputs = [folder / f"{name}.onnx" for name in names], folder / "check.npy"
    errors, peaks = folder / "rounding.json", folder / "peaks.npz"
    if not all(file.is_file() for file in (*graphs, errors, peaks, outputs)):
        folder.mkdir(parents=True, exist_ok=True)
        context.progress(0.05, "loading the model to trace it")
        model = _load(model_dir, header, context.threads)
        with torch.inference_mode(), _watch_inputs(model) as (rounding, largest):
            expected = model.answer(check).float().numpy()
        if spread_experts(model):
            with torch.inference_mode(), _watch_inputs(model) as (rounding, largest):
                model.answer(check)
        restate(model.model)
        with telling(context, 0.2, "tracing the model into a graph"), disk_errors():
            # Protobuf's limit is 2 GiB. Weights up to this limit are stored inside the file, larger ones in a second file.
            partial = folder / "partial"
            partial.mkdir(exist_ok=True)
            for name, (module, signature) in _parts(model, header, check).items():
                program = export_graph(module, header, signature)
                _name_after_modules(program.model.graph)
                if name == DECODER:
                    _settle_shapes(program.model.graph)
                without_notes(program.model.graph)
                program.save(partial / f"{name}.onnx", external_data=4 * header.parameters > 1_900_000_000)
                if OWN_SHAPES in header.config:
                    _leave_out_unread(partial / f"{name}.onnx")
            for file in partial.iterdir():
                file.replace(folder / file.name)
            partial.rmdir()
            write_file(errors, json.dumps(rounding).encode())
            np.savez(folder / "partial.npz", **largest)  # type: ignore[arg-type]  # numpy's stub reads ** as its keyword
            (folder / "partial.npz").replace(peaks)
            with (folder / "check.partial").open("wb") as stream:
                np.save(stream, expected)
                os.fsync(stream.fileno())
            (folder / "check.partial").replace(outputs)
        beside = (file for file in folder.glob("*.onnx.*") if file.is_file())  # weights beyond 2 GiB
        context.whole(1, *beside, *graphs, errors, peaks, outputs)
    with np.load(peaks) as archive:
        largest = {name: archive[name] for name in archive.files}
    return Traced(
        graphs[-1],
        np.load(outputs),
        json.loads(errors.read_bytes()),
        largest,
        cached=header.is_decoder,
        encoder=graphs[0] if len(graphs) > 1 else None,
    )


def _leave_out_unread(file: Path) -> None:
    """The table of `shape-to-speed` counts on a graph without what its answer does not read."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    if without_unread_positions(model):
        onnx.save(model, file)


def content_digest(model_dir: Path) -> str:
    """One digest of all files of a folder."""
    found = hashlib.sha256()
    for file in describe_folder(model_dir):
        found.update(f"{file.path} {file.sha256}\n".encode())
    return found.hexdigest()


@contextlib.contextmanager
def _watch_inputs(model: torch.nn.Module) -> Iterator[tuple[dict[str, float], dict[str, NDArray[np.float32]]]]:
    """Record two figures of each linear layer's inputs inside the block.

    The first is the relative error of the inputs when a runtime rounds them to uint8 with one scale. The second is each channel's largest
    magnitude, [in].
    """
    errors: dict[str, float] = {}
    largest: dict[str, NDArray[np.float32]] = {}

    def watch(name: str) -> Any:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].float()
            largest[name] = x.abs().flatten(0, -2).amax(0).numpy()
            low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
            scale = ((high - low) / 255).clamp(min=1e-30)
            zero = torch.round(-low / scale)
            rounded = (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale
            errors[name] = float((x - rounded).norm() / x.norm().clamp(min=1e-30))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name.removeprefix("model.")))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield errors, largest
    finally:
        for handle in handles:
            handle.remove()


def _load(model_dir: Path, header: ModelHeader, threads: int) -> Whole:
    torch.set_num_threads(threads)
    # Eager attention: the fused kernel would add needless nodes to the graph, its guard against rows without any token.
    with _quiet():
        weights = PressedWeights(model_dir)
        if weights.packed:
            model = _load_as_floats(model_dir, header, weights)
        else:
            model = load_model(model_dir, header, attention="eager")
    if header.is_decoder:
        return WithCache(model.eval()).eval()
    if header.task == "seq2seq":
        return EncoderDecoder(model.eval(), header).eval()
    output = "last_hidden_state" if header.task == "embedding" else "logits"
    if header.sees_images:
        return Sees(model, output).eval()
    return FirstOutput(model, output, types=takes_types(model, header)).eval()


def _parts(model: Whole, header: ModelHeader, check: Sequences) -> Mapping[str, tuple[torch.nn.Module, Signature]]:
    """The modules to trace. Raises NightpressError(unsupported_architecture) for an encoder-decoder whose caches are no plain tensors."""
    try:
        return model.parts(header, check)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        if header.task != "seq2seq":
            raise
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"A {header.architecture} can't be traced into an encoder and a decoder with a cache: {type(error).__name__}: {str(error)[:200]}",
            hint="Leave onnx and openvino out of `exports`.",
        ) from error


def _load_as_floats(model_dir: Path, header: ModelHeader, weights: PressedWeights) -> Any:
    """Load a packed model with dequantized weights, so that the graph has plain products in place of the loader's packed layers."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    floats = {name: torch.from_numpy(weights.floats(name)) for name in weights}
    loader = getattr(transformers, header.architecture)
    return loader.from_pretrained(
        None, config=config, state_dict=floats, dtype=torch.float32, attn_implementation="eager"
    )


def export_graph(model: torch.nn.Module, header: ModelHeader, signature: Signature) -> Any:
    """Export a module as an ONNX program. Raises NightpressError(unsupported_architecture) if it can't be traced."""
    try:
        with _quiet():
            return torch.onnx.export(
                model,
                signature.example,
                dynamo=True,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_shapes=signature.varying,
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"A {header.architecture} can't be traced into a graph: {_first_cause(error)[:300]}",
            hint="Leave onnx and openvino out of `exports`.",
        ) from error


def _first_cause(error: BaseException) -> str:
    """What the first error said, of which the others came. Later ones say only that tracing has failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _name_after_modules(graph: Any) -> None:
    """Name the node of a linear layer or an embedding after its module: a recipe's `ignore` and the report use the modules' names."""
    taken: set[str] = set()
    for node in graph:
        if node.op_type not in {"MatMul", "Gemm", "Gather"}:
            continue
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        modules = [part for part in scopes[:-1] if part]
        if not modules:
            continue
        module, operation = modules[-1].removeprefix("model."), scopes[-1]
        name = module if operation.startswith(("linear", "embedding", "addmm")) else f"{module}.{operation}"
        if name not in taken:
            taken.add(name)
            node.name = name


def _settle_shapes(graph: Any) -> None:
    """Write the known size in place of −1 into shapes that are put together as the graph runs.

    A tensor without elements, such as the new keys of an encoder's answer that is cached already, leaves −1 undecided. Products of several
    widths may share a shape; then −1 stays.
    """
    import onnx_ir

    for number, shape in enumerate([node for node in graph if node.op_type == "Concat"]):
        users = [user for user, _ in shape.outputs[0].uses()]
        if not users or any(user.op_type != "Reshape" or user.outputs[0].shape is None for user in users):
            continue
        for at, part in enumerate(shape.inputs):
            value = part.const_value
            sizes = {user.outputs[0].shape[at] for user in users if len(user.outputs[0].shape) == len(shape.inputs)}
            size = sizes.pop() if len(sizes) == 1 else None
            if value is not None and value.numpy().tolist() == [-1] and isinstance(size, int):
                name = f"settled_size_{number}"
                settled = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.array([size]), name=name))
                graph.register_initializer(settled)
                shape.replace_input_with(at, settled)


def without_notes(graph: Any) -> None:
    """Remove the exporter's notes on the origin of each node, including its stack trace. No runtime reads them."""
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about its own deprecations and about packages that are not needed. Neither concerns the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
