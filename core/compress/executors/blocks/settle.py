"""Calls a method to settle the weights of a block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nightpress.core.compress.executors.blocks.forward import ForwardPass
from nightpress.core.compress.executors.blocks.lessons import RunLessons
from nightpress.core.compress.executors.blocks.method import FinalTensor, Method
from nightpress.core.compress.executors.blocks.plan import BlockPlan
from nightpress.core.compress.executors.blocks.shared import merge_settled, same_everywhere
from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.executors.watch import Inputs
from nightpress.core.compress.model.rows import is_conv1d
from nightpress.core.compress.numerical_failures import check_finite, naming
from nightpress.core.compress.ranks.group import ALONE, Group

#: Groups of layers are settled by different processes if there are at least so many for each.
_GROUPS_A_PROCESS = 4


@dataclass(frozen=True)
class BlockOutcome:
    """The result of settling a block, or some of its layers."""

    settled: Mapping[str, FinalTensor]
    unseen: tuple[str, ...] = ()  #: weights that no calibration token reached
    undersampled: tuple[tuple[str, int], ...] = ()  #: as in `RunResult`
    warnings: tuple[str, ...] = ()
    figures: tuple[tuple[str, float], ...] = ()  #: of the block, by name

    def __or__(self, later: "BlockOutcome") -> "BlockOutcome":
        return BlockOutcome(
            {**self.settled, **later.settled},
            self.unseen + later.unseen,
            self.undersampled + later.undersampled,
            self.warnings + later.warnings,
            self.figures + later.figures,
        )


@dataclass(frozen=True)
class Settler:
    """Applies a method to the blocks of a run."""

    plan: BlockPlan
    method: Method
    forward: ForwardPass
    lessons: RunLessons | None = None  #: for a method that learns

    def settle(
        self, index: int, tensors: Mapping[str, Tensor], inputs: Sequence[Inputs], linears: Mapping[str, nn.Module]
    ) -> BlockOutcome:
        """Settle these tensors of a block with the method. inputs: statistics of the layers to settle; linears: these layers.

        Methods see weights as [out, in]: those of Conv1D are transposed before and after. Raises NightpressError(numerical_failure).
        """
        layers = [[name.removesuffix(".weight") for name in seen.names] for seen in inputs]
        for names, seen in zip(layers, inputs, strict=True):
            check_finite(names, seen.statistic)
        transposed = {name for name, layer in linears.items() if is_conv1d(layer)}
        given = {name: tensor.t().contiguous() if name in transposed else tensor for name, tensor in tensors.items()}
        with naming([name for names in layers for name in names]):
            live, settled = self._settle(index, given, transposed, inputs, linears)
        return BlockOutcome(
            settled={
                name: _transposed(name, tensor) if name in transposed else tensor for name, tensor in settled.items()
            },
            unseen=tuple(name for seen in inputs if seen.statistic.tokens == 0 for name in seen.names),
            warnings=tuple(live.warnings),
            figures=tuple(live.figures.items()),
        )

    def _settle(
        self,
        index: int,
        given: Mapping[str, Tensor],
        transposed: set[str],
        inputs: Sequence[Inputs],
        linears: Mapping[str, nn.Module],
    ) -> tuple[LiveBlock, Mapping[str, FinalTensor]]:
        """Call the method. Where several processes settle a block, all end with the same tensors, bit by bit.

        If there are many groups of layers, e.g. those of experts, each process settles some of them. Else all processes settle the same
        layers, and the method shares out its work.
        """
        group, device = self.plan.group, self.plan.device
        if not self.method.by_group or len(inputs) < _GROUPS_A_PROCESS * group.size:
            live = self._live_block(index, given, transposed, linears, group)
            return live, same_everywhere(group, self.method.settle(live, inputs, device))
        live = self._live_block(index, given, transposed, linears, ALONE)
        own = group.portion([_effort(seen, given) for seen in inputs])[group.rank]
        return live, merge_settled(group, self.method.settle(live, [inputs[at] for at in own], device), device)

    def _live_block(
        self,
        index: int,
        given: Mapping[str, Tensor],
        transposed: set[str],
        linears: Mapping[str, nn.Module],
        group: Group,
    ) -> LiveBlock:
        """The block as a method gets it. Only a method that settles all layers at once may run the block."""
        block = self.plan.skeleton.blocks[index]
        if self.lessons is not None:
            return LiveBlock(given, block, lessons=self.lessons.of_block(index, linears), group=group)
        probe = None if self.method.by_group else self.forward.probe(index)
        if probe is None:
            return LiveBlock(given, block, group=group)
        return LiveBlock(given, block, *probe, transposed, group=group)


def _effort(seen: Inputs, given: Mapping[str, Tensor]) -> float:
    """The work of settling layers with a Gram matrix, up to a factor: its factor n³/3, and m · n²/2 for m outputs."""
    rows, columns = sum(len(given[name]) for name in seen.names), given[seen.names[0]].shape[1]
    return columns**3 / 3 + rows * columns**2 / 2


def _transposed(name: str, tensor: FinalTensor) -> FinalTensor:
    """A settled weight in the layout [in, out]."""
    assert tensor.tensors.keys() == {name}, "codes can't be transposed"
    weight = tensor.weight.t().contiguous()
    return FinalTensor(weight=weight, tensors={name: weight}, effect=tensor.effect)
