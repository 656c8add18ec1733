"""The graph executor: trace a model once into an ONNX graph, from which every graph format is made.

The trace is the resume point. It takes most of the time, and another attempt of the same job finds it in the job's work folder.
"""

import ast
import contextlib
import hashlib
import inspect
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
from nightpress.core.compress.graph.telling import telling
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.model.networks import load_model
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import describe_folder
from nightpress.core.recipes.header import ModelHeader

#: The names of dimensions that vary. Generation libraries look for these names: transformers.js makes an empty cache from them.
_BATCH, _LENGTH = "batch_size", "sequence_length"
_BOTH = {0: _BATCH, 1: _LENGTH}
_SEEN = {0: _BATCH, 1: "total_sequence_length"}
_PAST = {0: _BATCH, 2: "past_sequence_length"}
OPSET = 20  #: the first with Gelu as one node; ONNX Runtime reads it since 1.17, OpenVINO since 2024.0


@dataclass(frozen=True)
class Traced:
    """A model as an fp32 ONNX graph, with the outputs of the traced model itself for a few check texts."""

    path: Path
    check: NDArray[np.float32]  #: the model's first output for the check texts: [B, S, …] or [B, C]
    #: linear layer → relative error of its input on the check texts, rounded to 8 bits with one scale
    rounding: Mapping[str, float]
    #: linear layer → largest magnitude of each input channel on the check texts, [in]
    peaks: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    cached: bool = False  #: the graph reads and returns a key/value cache: it is a decoder's


def trace(model_dir: Path, header: ModelHeader, check: Sequences, context: PassContext) -> Traced:
    """Trace a model, or find the trace of an earlier attempt.

    Attempts have folders with different names. So the trace is found by a hash of the model's files, its header and the check texts.
    """
    context.progress(0.0, "looking for an earlier trace of this model")
    key = hashlib.sha256(f"{content_digest(model_dir)}\n{header.model_dump_json()}\n{OPSET}\n".encode())
    key.update(check.ids.tobytes())
    if check.types is not None:
        key.update(check.types.tobytes())
    folder = context.work_dir / "graph" / key.hexdigest()[:16]
    graph, outputs = folder / "model.onnx", folder / "check.npy"
    errors, peaks = folder / "rounding.json", folder / "peaks.npz"
    if not all(file.is_file() for file in (graph, errors, peaks, outputs)):
        folder.mkdir(parents=True, exist_ok=True)
        context.progress(0.05, "loading the model to trace it")
        model = _load(model_dir, header, context.threads)
        with torch.inference_mode(), _watch_inputs(model) as (rounding, largest):
            types = None if check.types is None else torch.from_numpy(check.types)
            expected = model.answer(torch.from_numpy(check.ids), torch.from_numpy(check.mask), types).float().numpy()
        with telling(context, 0.2, "tracing the model into a graph"), disk_errors():
            # Protobuf's limit is 2 GiB. Weights up to this limit are stored inside the file, larger ones in a second file.
            partial = folder / "partial"
            partial.mkdir(exist_ok=True)
            program = export_graph(model, header, model.signature(example_ids(header)))
            _name_after_modules(program.model.graph)
            without_notes(program.model.graph)
            program.save(partial / "model.onnx", external_data=4 * header.parameters > 1_900_000_000)
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
        beside = (file for file in folder.glob(f"{graph.name}.*") if file.is_file())  # weights beyond 2 GiB
        context.whole(1, *beside, graph, errors, peaks, outputs)
    with np.load(peaks) as archive:
        largest = {name: archive[name] for name in archive.files}
    return Traced(graph, np.load(outputs), json.loads(errors.read_bytes()), largest, cached=header.is_decoder)


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


@dataclass(frozen=True)
class Signature:
    """A graph's inputs and outputs: their names, example inputs, and the dimensions that vary."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[Any, ...]
    varying: tuple[Any, ...]


class _FirstOutput(torch.nn.Module):
    """A model with positional inputs and one output: its logits, or its last hidden state."""

    def __init__(self, model: torch.nn.Module, output: str, *, types: bool) -> None:
        super().__init__()
        self.model, self.output, self.types = model, output, types

    def answer(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        """The model's own output for whole texts. ids, mask, types [B, S]; types None: single texts."""
        out: torch.Tensor = self(ids, mask, types)
        return out

    def signature(self, ids: torch.Tensor) -> Signature:
        return encoder_signature(ids, types=self.types, outputs=[self.output])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        extra = {"token_type_ids": token_type_ids} if token_type_ids is not None else {}
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **extra)
        out: torch.Tensor = getattr(result, self.output)
        return out


class _WithCache(torch.nn.Module):
    """A decoder that reads its key/value cache as tensors and returns the extended cache: one graph reads a prompt and generates.

    The tensors have the names that generation libraries look for: `past_key_values.0.key` [B, heads, past, width] is read and
    `present.0.key` is returned.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        with torch.inference_mode():
            cache = model(input_ids=torch.full((1, 2), 5), use_cache=True).past_key_values
        self.shapes = [
            (states.shape[1], states.shape[3]) for layer in cache.layers for states in (layer.keys, layer.values)
        ]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **({"position_ids": position_ids} if self._takes_positions else {}),
        )
        present = [states for layer in out.past_key_values.layers for states in (layer.keys, layer.values)]
        return (out.logits, *present)

    @property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def answer(self, ids: torch.Tensor, mask: torch.Tensor, _types: torch.Tensor | None = None) -> torch.Tensor:
        """The model's own logits for whole texts, computed without a cache. ids, mask [B, S]."""
        out: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return out

    def signature(self, ids: torch.Tensor) -> Signature:
        batch, length, past = *ids.shape, 3
        cache = [torch.zeros(batch, heads, past, width) for heads, width in self.shapes]
        layers = [f"{at}.{part}" for at in range(len(cache) // 2) for part in ("key", "value")]
        positions = torch.arange(past, past + length).expand(batch, length).contiguous()
        return Signature(
            ("input_ids", "attention_mask", "position_ids", *(f"past_key_values.{layer}" for layer in layers)),
            ("logits", *(f"present.{layer}" for layer in layers)),
            (ids, torch.ones(batch, past + length, dtype=torch.int64), positions, cache),
            (dict(_BOTH), dict(_SEEN), dict(_BOTH), [dict(_PAST) for _ in cache]),
        )


def _load(model_dir: Path, header: ModelHeader, threads: int) -> _FirstOutput | _WithCache:
    torch.set_num_threads(threads)
    # Eager attention: the fused kernel would add needless nodes to the graph, its guard against rows without any token.
    with _quiet():
        weights = PressedWeights(model_dir)
        if weights.packed:
            model = _load_as_floats(model_dir, header, weights)
        else:
            model = load_model(model_dir, header, attention="eager")
    if header.is_decoder:
        return _WithCache(model.eval()).eval()
    output = "last_hidden_state" if header.task == "embedding" else "logits"
    return _FirstOutput(model, output, types=takes_types(model, header)).eval()


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


def takes_types(model: Any, header: ModelHeader) -> bool:
    """Whether a model reads token types and has more than one type."""
    asks = "token_type_ids" in inspect.signature(model.forward).parameters
    return asks and int(header.config.get("type_vocab_size") or 0) > 1


def example_ids(header: ModelHeader) -> torch.Tensor:
    """Token ids of two example texts for tracing: int64 [2, 16]."""
    return torch.arange(5, 5 + 32).reshape(2, 16) % max(header.vocabulary or 64, 6)


def encoder_signature(ids: torch.Tensor, *, types: bool, outputs: list[str]) -> Signature:
    """The signature of a module that reads ids, mask and, with `types`, token types. Batch and length vary."""
    example = (ids, torch.ones_like(ids)) + ((torch.zeros_like(ids),) if types else ())
    names = ("input_ids", "attention_mask", "token_type_ids")[: len(example)]
    return Signature(names, tuple(outputs), example, tuple(dict(_BOTH) for _ in names))


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
