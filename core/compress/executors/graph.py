"""The graph executor: a model traced once into an ONNX graph, from which each graph format is made.

The trace is the resume point: it costs most of the time, and another attempt of the same job finds it in the job's work folder.
"""

import contextlib
import hashlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.compress.checkpoint import disk_errors
from core.compress.evaluate.data import Sequences
from core.compress.passes.context import PassContext
from core.errors import ErrorCode, NightpressError
from core.recipes.header import ModelHeader

OPSET = 18  #: read by every ONNX Runtime and OpenVINO of the last two years

_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
}


@dataclass(frozen=True)
class Traced:
    """A model as an fp32 ONNX graph, and what the traced model itself says of a few texts."""

    path: Path
    check: NDArray[np.float32]  #: the model's first output for the check texts: [B, S, …] or [B, C]


def trace(model_dir: Path, header: ModelHeader, check: Sequences, context: PassContext) -> Traced:
    """Trace once. `model_dir` is immutable: its folder name and header decide whether a kept trace is of the same model."""
    key = hashlib.sha256(f"{model_dir.resolve()}\n{header.model_dump_json()}\n{OPSET}\n".encode() + check.ids.tobytes())
    folder = context.work_dir / "graph" / key.hexdigest()[:16]
    graph, outputs = folder / "model.onnx", folder / "check.npy"
    if not (graph.is_file() and outputs.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        context.progress(0.05, "loading the model to trace it")
        model = _load(model_dir, header, context.threads)
        with torch.inference_mode():
            expected = model(torch.from_numpy(check.ids), torch.from_numpy(check.mask)).float().numpy()
        context.progress(0.2, "tracing the model into a graph")
        with disk_errors():
            # The weights lie inside the file up to protobuf's 2 GiB; beyond, in one file beside it.
            partial = folder / "partial"
            partial.mkdir(exist_ok=True)
            _export(model, header).save(partial / "model.onnx", external_data=4 * header.parameters > 1_900_000_000)
            for file in partial.iterdir():
                file.replace(folder / file.name)
            partial.rmdir()
            with (folder / "check.partial").open("wb") as stream:
                np.save(stream, expected)
                os.fsync(stream.fileno())
            (folder / "check.partial").replace(outputs)
        context.checkpoint(graph.relative_to(context.work_dir).as_posix(), 1)
    return Traced(graph, np.load(outputs))


class _FirstOutput(torch.nn.Module):
    """A model with positional inputs and one output: its logits, or its last hidden state."""

    def __init__(self, model: torch.nn.Module, output: str, *, types: bool) -> None:
        super().__init__()
        self.model, self.output, self.types = model, output, types

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        extra = {"token_type_ids": token_type_ids} if token_type_ids is not None else {}
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **extra)
        out: torch.Tensor = getattr(result, self.output)
        return out


def _load(model_dir: Path, header: ModelHeader, threads: int) -> _FirstOutput:
    import transformers

    torch.set_num_threads(threads)
    # Plain attention: the fused kernel's guard against rows without any token would only clutter the graph.
    with _quiet():
        model = getattr(transformers, _CLASSES[header.task]).from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
        )
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    types = takes_types and int(header.config.get("type_vocab_size") or 0) > 1
    return _FirstOutput(model, "last_hidden_state" if header.task == "embedding" else "logits", types=types).eval()


def _export(model: _FirstOutput, header: ModelHeader) -> Any:
    ids = torch.arange(5, 5 + 32).reshape(2, 16) % max(int(header.config.get("vocab_size") or 64), 6)
    example = [ids, torch.ones_like(ids)] + ([torch.zeros_like(ids)] if model.types else [])
    names = ["input_ids", "attention_mask", "token_type_ids"][: len(example)]
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet():
            return torch.onnx.export(
                model,
                tuple(example),
                dynamo=True,
                input_names=names,
                output_names=[model.output],
                dynamic_shapes=tuple(dict(both) for _ in names),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"A {header.architecture} can't be traced into a graph: {str(error).strip().splitlines()[-1][:300]}",
            hint="Leave onnx and openvino out of `exports`.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own deprecations and of packages nobody needs here; neither is about the model."""
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
