"""What a block is to answer, for methods that learn its weights by gradients.

The samples run twice through the model: through the settled blocks, and through the source's blocks. A settled block gets what the settled
blocks before it pass on, and is to answer what the source's block answers in the source model. So it also makes up for the errors of the
blocks before it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks.forward import ForwardPass
from nightpress.core.compress.executors.blocks.plan import BlockPlan


class RunLessons:
    """The lessons of a run: the samples in the source model beside the samples in the settled model."""

    def __init__(self, plan: BlockPlan, forward: ForwardPass, step: int, context: PassContext) -> None:
        """forward: the samples in the settled model. step: samples of a learning step."""
        self._plan, self._forward, self._context = plan, forward, context
        self._source = ForwardPass(plan, None, context.work_dir)
        self._step_batches = max(1, step // plan.batch)

    def enter_row(self, row: int) -> None:
        self._source.enter_row(row)

    def advance_source(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Run all samples of the source model through a block. tensors: of the source's block."""
        self._plan.skeleton.fill_block(index, tensors)
        self._source.advance(index)

    def of_block(self, index: int, layers: Mapping[str, nn.Module]) -> "BlockLessons":
        """The lessons of a block whose weights are loaded. layers: its layers to settle, by the names of their weights."""
        return BlockLessons(
            self._plan, self._forward, self._source, index, layers, self._step_batches, context=self._context
        )


@dataclass(frozen=True)
class BlockLessons:
    """The lessons of one block: see `Lessons`."""

    plan: BlockPlan
    forward: ForwardPass
    source: ForwardPass  #: its hidden states are the block's outputs in the source model
    index: int
    layers: Mapping[str, nn.Module]
    step_batches: int
    context: PassContext
    input_rules: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)  #: by the names of the weights

    @property
    def batches(self) -> int:
        return len(self.plan.numbers)

    def put(self, name: str, weight: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(weight.to(self._dtype))
        self.layers[name].weight = parameter
        return parameter

    def round_inputs(self, name: str, rule: Callable[[Tensor], Tensor]) -> None:
        self.input_rules[name] = rule

    def squared_error(self, batch: int) -> Tensor | None:
        own = self.plan.numbers[batch]
        return None if own is None else self._squared_error(own)

    def _squared_error(self, batch: int) -> Tensor:
        in_bfloat16 = torch.autocast(
            self.plan.device.type, torch.bfloat16, enabled=self._dtype != self.plan.skeleton.dtype
        )
        with in_bfloat16, self._rounding():
            out = self.forward.run_batch(self.index, batch, self.forward.hidden.look_at(batch))
        lost = (out.float() - self.source.hidden.look_at(batch).float()).square()
        real = self.forward.real(batch)
        return lost.sum() if real is None else (lost * real[..., None]).sum()

    def tell(self, done: float) -> None:
        count = self.plan.blocks
        self.context.progress((self.index + done) / count, f"block {self.index + 1} of {count}, {done:.0%} learned")

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, rule in self.input_rules.items():
                hook = partial(_round_first, rule)
                stack.callback(self.layers[name].register_forward_pre_hook(hook).remove)
            yield

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the layers' products. Gradients in float16 would vanish: bfloat16 has float32's range."""
        dtype = self.plan.skeleton.dtype
        return torch.bfloat16 if dtype == torch.float16 else dtype


def _round_first(rule: Callable[[Tensor], Tensor], _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (rule(args[0]), *args[1:])
