"""Trains the scales, norms and biases of a rounded model on the source's logits. The codes stay as they are."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.train import TrainingResult
from nightpress.core.compress.grids.dequantized import StoredWeights, write_dequantized
from nightpress.core.compress.model.checkpoint import disk_errors, read_shards, tensor_bytes
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.passes.distill import in_processes, record_of, teach
from nightpress.core.compress.passes.low_rank import add_changes, write_adapter
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.scaled_linear import ScaledLinear
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes.recover_scales import RecoverScales
from nightpress.core.recipes.schemes import Activations

ADAPTER = "adapter"  #: the folder of the LoRA adapter, in the model's folder


@folder_pass(RecoverScales)
def recover_scales(source: Path, target: Path, options: RecoverScales, context: PassContext) -> PassRecord:
    """Train the scales of the rounded model in `source`, with the job's source model as its teacher. `target` has the same codes."""
    return in_processes(_recover_scales, source, target, options, context)


def _recover_scales(source: Path, target: Path, options: RecoverScales, *, context: PassContext) -> PassRecord:
    start = time.monotonic()
    assert context.origin is not None, "the teacher can't be the rounded model"
    teacher = load_model(context.origin, inspect_model(FolderFiles(context.origin)))
    student = load_rounded(source, context)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"`{options.name}`: the rounded model reads {student.config.vocab_size} tokens, its source {teacher.config.vocab_size}.",
            hint="Take out the pass that changed the vocabulary.",
        )
    scaled = put_in(student, source)
    learn_small_parts(student)
    given = {
        name: parameter.detach().clone() for name, parameter in student.named_parameters() if parameter.requires_grad
    }
    part = context if options.rank is None else context.part(0.0, 0.5)
    trained, extra = teach(student, teacher, [], source, options, part, measured=True)
    recovered = _keep_the_better(student, given, trained, extra)
    if context.group.first:
        write_recovered(source, target, changed(student, scaled, source))
    told = {"scaled_layers": len(scaled), **extra, **recovered}
    if options.rank is not None:
        told |= _adapter(student, teacher, source, target, options, context.part(0.5, 1.0, "adapter: "))
    return record_of(options, context, student, teacher, trained, start, told)


def load_rounded(source: Path, context: PassContext) -> Any:
    """Load a rounded model with its dequantized weights, in float32."""
    floats = context.work_dir / "rounded" / str(context.index)
    if context.group.first:
        shutil.rmtree(floats, ignore_errors=True)
        write_dequantized(source, floats)
    context.group.collect(None)  # the others load what the first has written
    model = load_model(floats, inspect_model(FolderFiles(floats)))
    context.group.collect(None)
    if context.group.first:
        shutil.rmtree(floats)
    return model


def put_in(model: Any, source: Path) -> dict[str, ScaledLinear]:
    """Replace the linear layers whose weights are codes in the folder. Returns them by the names of their weights in the files."""
    stored, inputs = StoredWeights(source), _rounded_inputs(source)
    found: dict[str, ScaledLinear] = {}
    for name, module in list(model.named_modules()):
        weight = next((file for file in in_files(f"{name}.weight") if file in stored.quantized), None)
        if isinstance(module, nn.Linear) and weight is not None:
            scheme = dataclasses.replace(stored.scheme(weight), activations=inputs)
            found[weight] = ScaledLinear(module, scheme, stored.parts(weight))
            above, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(above), leaf, found[weight])
    return found


def _rounded_inputs(source: Path) -> Activations | None:
    """How a runtime rounds the inputs of the folder's layers, which is the same for all."""
    (group, *_) = json.loads((source / "config.json").read_bytes())["quantization_config"]["config_groups"].values()
    return None if group["input_activations"] is None else Activations(bits=group["input_activations"]["num_bits"])


def in_files(name: str) -> tuple[str, ...]:
    """The names that a parameter of the model may have in its files: those saved without a head lack the head's prefix."""
    return (name, name.split(".", 1)[1]) if "." in name else (name,)


def learn_small_parts(model: Any) -> None:
    """Let scales, norms and biases learn, and nothing else."""
    model.requires_grad_(False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            small = name in {"change", "bias"} if isinstance(module, ScaledLinear) else parameter.dim() == 1
            parameter.requires_grad_(small)


def changed(model: Any, scaled: Mapping[str, ScaledLinear], source: Path) -> dict[str, Tensor]:
    """The tensors of the files that have learned, by name, in their stored dtypes."""
    weights = StoredWeights(source)
    found = {f"{name}_scale": layer.stored_scale() for name, layer in scaled.items() if layer.change is not None}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith(".change"):
            file = next((file for file in in_files(name) if file in weights.names), None)
            if file is not None:
                found[file] = parameter.detach()
    return found


def write_recovered(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy the folder, with these tensors in place of its own. Each is stored in the dtype that it has there."""
    own = SourceTensors.in_folder(source)
    with disk_errors():
        shutil.copytree(source, target, dirs_exist_ok=True)
        for shard in read_shards(target):
            with shard.path.open("r+b") as file:
                for stored in shard.tensors:
                    if stored.name in tensors:
                        before = own.read(stored.name)
                        learned = tensors[stored.name].cpu().to(before.dtype).view(before.shape)
                        file.seek(stored.offset)
                        file.write(tensor_bytes(learned.contiguous()))
                file.flush()
                os.fsync(file.fileno())


def _keep_the_better(
    student: Any, given: Mapping[str, Tensor], trained: TrainingResult, extra: dict[str, Any]
) -> dict[str, Any]:
    """Take the parameters from before the training if they are better. Returns how much of the loss was recovered."""
    before, after = extra.get("loss_before"), trained.validation.get("loss")
    if before is None or after is None:
        return {}
    if after > before:
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if name in given:
                    parameter.copy_(given[name])
        after = before
    return {"loss_after": after, "recovered": 1 - after / before if before else 0.0}


def _adapter(
    student: Any, teacher: Any, source: Path, target: Path, options: RecoverScales, context: PassContext
) -> dict[str, Any]:
    """Train a LoRA adapter over the recovered model, and write it beside the model if it makes it better.

    Returns the adapter's folder and the share of the remaining loss that it recovers.
    """
    assert options.rank is not None
    ranks = {name: options.rank for name, module in student.named_modules() if isinstance(module, ScaledLinear)}
    added = add_changes(student, ranks, options.alpha / options.rank, seed=context.seed)
    trained, extra = teach(student, teacher, [], source, options, context, measured=True)
    before, after = extra.get("loss_before"), trained.validation.get("loss")
    if before is not None and after is not None and after >= before:
        return {"adapter": None, "adapter_recovered": 0.0}
    if context.group.first:
        write_adapter(target / ADAPTER, added, options.rank, options.alpha)
    recovered = None if not before or after is None else 1 - after / before
    return {"adapter": ADAPTER, "adapter_recovered": recovered}
