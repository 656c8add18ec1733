"""What it costs an encoder to lose parts of a module, measured on examples: the moments of what its output projection reads, and the loss
without the module."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Batch, Examples, collate
from nightpress.core.compress.executors.watch import without_padding
from nightpress.core.compress.numerical_failures import check_finite
from nightpress.core.compress.passes.distill import StudentTraining
from nightpress.core.compress.solvers.units import Known, Moments
from nightpress.core.recipes.anatomy import Anatomy, Inner
from nightpress.core.recipes.passes import ShapeToSpeed


@dataclass(frozen=True)
class Module:
    """The attention or the feed-forward of a layer."""

    block: int
    inner: Inner
    name: str  #: path of its output projection in the model
    width: int  #: columns of a unit


def modules_of(path: str, blocks: int, anatomy: Anatomy) -> Iterator[Module]:
    for block in range(blocks):
        for inner in (anatomy.family.attention, anatomy.family.feed_forward):
            yield Module(block, inner, f"{path}.{block}.{inner.output}", anatomy.unit(inner))


def _batches(examples: Examples, options: ShapeToSpeed, device: torch.device, *, seed: int = 0) -> Iterator[Batch]:
    order = np.argsort([len(row) for row in examples.ids], kind="stable")
    for start in range(0, len(order), options.train.batch):
        yield collate(examples, order[start : start + options.train.batch], device, seed=seed)


def moments(
    student: Any, modules: Sequence[Module], examples: Examples, options: ShapeToSpeed, device: torch.device
) -> dict[str, Known]:
    """The moments of the inputs of each module's output projection."""
    sums: dict[str, Moments] = {}
    real: list[Tensor] = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            sums.setdefault(name, Moments(layer.in_features, device)).add(without_padding(inputs[0], real[0]))

        return hook

    handles = [student.get_submodule(module.name).register_forward_pre_hook(watch(module.name)) for module in modules]
    try:
        with torch.inference_mode():
            for batch in _batches(examples, options, device):
                real[:] = [batch.mask.bool()]
                student(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, found in sums.items():
        check_finite([name], found)
    centred = {module.name: student.get_submodule(module.name).bias is not None for module in modules}
    with torch.inference_mode():
        finished = {name: found.finish(centred=centred[name]) for name, found in sums.items()}
    return {name: Known(found.second.clone(), found.mean.clone()) for name, found in finished.items()}


def sensitivities(
    lesson: StudentTraining,
    student: Any,
    modules: Sequence[Module],
    known: Mapping[str, Known],
    examples: Examples,
    options: ShapeToSpeed,
    context: PassContext,
) -> list[float]:
    """What the training's loss gains if each module is left out, and the mean of its output stays."""
    device = torch.device(context.device)

    def loss() -> float:
        total, texts = 0.0, 0
        with torch.no_grad():
            for batch in _batches(examples, options, device, seed=context.seed):  # the same words are masked each time
                total += float(lesson.losses(batch)["loss"]) * len(batch.ids)
                texts += len(batch.ids)
        return total / texts

    whole, found = loss(), []
    for at, module in enumerate(modules):
        context.progress(0.02 + 0.08 * at / len(modules), f"leaving out {module.name}, {at + 1} of {len(modules)}")
        layer = student.get_submodule(module.name)
        mean = layer.weight.detach() @ known[module.name].mean
        mean = mean if layer.bias is None else mean + layer.bias.detach()
        handle = layer.register_forward_hook(lambda _layer, _inputs, out, mean=mean: mean.expand_as(out))
        try:
            found.append(loss() - whole)
        finally:
            handle.remove()
    smallest = 1e-3 * max(*found, 1e-9)  # no module is worth nothing: among those, the smaller error decides
    return [max(gain, smallest) for gain in found]
