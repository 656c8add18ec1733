"""Quantization-aware training (QAT): linear layers compute with the rounded values of their weights."""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.train import TrainingResult
from nightpress.core.compress.grids.stored import dequantized, round_weight
from nightpress.core.compress.model.checkpoint import TORCH_DTYPES
from nightpress.core.compress.model.networks import embeddings_of, load_model, save_model
from nightpress.core.compress.passes.distill import in_processes, record_of, teach
from nightpress.core.compress.passes.quantize import stream_rounded
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.linears import module_of
from nightpress.core.recipes.passes.qat import Qat
from nightpress.core.recipes.schemes import Scheme


@folder_pass(Qat)
def qat(source: Path, target: Path, options: Qat, context: PassContext) -> PassRecord:
    """Train the rounded model against its own float model as the teacher.

    `target` becomes a compressed-tensors model, or with `leaves: float` a float model whose weights lie on the grid.
    """
    start = time.monotonic()
    if options.leaves_as == "float":
        return in_processes(_qat, source, target, options, context)
    floats = context.work_dir / "aware" / str(context.index)
    record = in_processes(_qat, source, floats, options, context)
    seen = dataclasses.replace(context, header=inspect_model(FolderFiles(floats)))
    written = stream_rounded(floats, target, options, seen, {}, fast=False)
    shutil.rmtree(floats)
    return record.model_copy(
        update={
            "summary": {**record.summary, **written.summary},
            "layers": written.layers,
            "seconds": time.monotonic() - start,
        }
    )


def _qat(source: Path, target: Path, options: Qat, *, context: PassContext) -> PassRecord:
    """Train, and save the float model."""
    start = time.monotonic()
    student, trained, extra = train_rounded(source, options, context)
    rounded = take_out(student, settle=options.leaves_as == "float")
    if context.group.first:
        save_model(student, source, target, context.header)
    return record_of(options, context, student, student, trained, start, {"layers": len(rounded), **extra})


def train_rounded(source: Path, options: Qat, context: PassContext) -> tuple[Any, TrainingResult, dict[str, Any]]:
    """Return the trained model, still with `RoundedLinear` layers; `take_out` replaces them with plain layers."""
    teacher = load_model(source, context.header)
    student = load_model(source, context.header)
    put_in(student, options, context.header)
    frozen = embeddings_of(student) if options.train.freeze_embeddings else []
    trained, extra = teach(student, teacher, frozen, source, options, context)
    return student, trained, extra


class RoundedLinear(nn.Module):
    """A linear layer that rounds its weight, and its input if the scheme does. The gradient ignores the rounding (straight-through)."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, stored: torch.dtype, *, graph: bool) -> None:
        super().__init__()
        self.linear, self.scheme, self.stored, self.graph = linear, scheme, stored, graph

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        weight = weight + (self.rounded() - weight).detach()
        if self.scheme.activations is not None:
            x = x + (round_tokens(x) - x).detach()
        return nn.functional.linear(x, weight, self.linear.bias)

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """Return the weight [out, in] float32 as a loader would dequantize it."""
        weight = self.linear.weight.to(self.stored).float()
        if self.graph:
            return on_graph_grid(weight)
        return dequantized(round_weight(weight, self.scheme, self.stored), self.scheme)


def on_graph_grid(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to −127 … 127 steps of its row's largest magnitude / 127.

    This is the grid of `dynamic-int8`: that pass finds the same scales again, and loses nothing.
    """
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=2.0**-100)
    return (weight / scale).round() * scale


def round_tokens(x: Tensor) -> Tensor:
    """Round each token's vector [..., in] to int8 with its own scale, as runtimes of compressed-tensors do."""
    scale = (x.detach().float().abs().amax(-1, keepdim=True) / 127.5).clamp(min=2.0**-100)
    return ((x.float() / scale).round().clamp(-128, 127) * scale).to(x.dtype)


def put_in(model: Any, options: Qat, header: ModelHeader) -> list[str]:
    """Replace the linear layers that the options select with `RoundedLinear`. Return their names."""
    stored = {module_of(tensor): TORCH_DTYPES[tensor.dtype] for tensor in header.tensors if options.takes(tensor)}
    names = []
    for name, module in list(model.named_modules()):
        in_file = next((file for file in (name, *_shorter(name)) if file in stored), None)
        if isinstance(module, nn.Linear) and in_file is not None:
            rounded = RoundedLinear(
                module, options.scheme(in_file), stored[in_file], graph=options.leaves_as == "float"
            )
            _put(model, name, rounded)
            names.append(name)
    return names


def take_out(model: Any, *, settle: bool) -> list[str]:
    """Put the plain layers back. With `settle`, their weights become the rounded ones. Return their names."""
    names = []
    for name, module in list(model.named_modules()):
        if isinstance(module, RoundedLinear):
            if settle:
                with torch.no_grad():
                    module.linear.weight.copy_(module.rounded())
            _put(model, name, module.linear)
            names.append(name)
    return names


def _shorter(name: str) -> tuple[str, ...]:
    """Return the module's name without its first part: files saved without a head name modules without the head's prefix."""
    return (name.split(".", 1)[1],) if "." in name else ()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    above, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(above), leaf, module)
