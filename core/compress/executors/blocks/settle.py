"""Calls a method to settle the weights of a block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from nightpress.core.compress.executors.blocks.forward import ForwardPass
from nightpress.core.compress.executors.blocks.lessons import RunLessons
from nightpress.core.compress.executors.blocks.method import FinalTensor, Method, Written
from nightpress.core.compress.executors.blocks.plan import BlockPlan
from nightpress.core.compress.executors.blocks.shared import bring_to_first, same_everywhere
from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.executors.watch import Inputs
from nightpress.core.compress.model.rows import is_conv1d
from nightpress.core.compress.numerical_failures import check_finite, naming
from nightpress.core.compress.ranks.group import ALONE, Group


@dataclass(frozen=True)
class BlockOutcome:
    """The result of settling a block, or some of its layers."""

    settled: Mapping[str, FinalTensor]
    unseen: tuple[str, ...] = ()  #: weights that no calibration token reached
    undersampled: tuple[tuple[str, int], ...] = ()  #: as in `RunResult`
    warnings: tuple[str, ...] = ()
    figures: tuple[tuple[str, float], ...] = ()  #: of the block, by name
    #: In the first process: what the others have settled of their experts.
    brought: Mapping[str, Written] = field(default_factory=dict)

    @property
    def written(self) -> dict[str, Written]:
        """What is to be written, by the name of the tensor that it is written for."""
        own = {name: Written(final.tensors, final.effect) for name, final in self.settled.items()}
        return {**own, **self.brought}

    def __or__(self, later: "BlockOutcome") -> "BlockOutcome":
        return BlockOutcome(
            {**self.settled, **later.settled},
            self.unseen + later.unseen,
            self.undersampled + later.undersampled,
            self.warnings + later.warnings,
            self.figures + later.figures,
            {**self.brought, **later.brought},
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
        own = [seen for seen in inputs if self._owned(seen.names[0])]
        common = [seen for seen in inputs if not self._owned(seen.names[0])]
        with naming([name for names in layers for name in names]):
            live, settled = self._settle(index, given, transposed, common, own, linears)
        outcome = BlockOutcome(
            settled={
                name: _transposed(name, tensor) if name in transposed else tensor for name, tensor in settled.items()
            },
            unseen=tuple(name for seen in inputs if seen.statistic.tokens == 0 for name in seen.names),
            warnings=tuple(live.warnings),
            figures=tuple(live.figures.items()),
        )
        return self._join(outcome) if self.plan.skeleton.shares_experts(index) else outcome

    def _owned(self, name: str) -> bool:
        """Whether this process alone holds a tensor."""
        return self.plan.skeleton.owner(name) is not None

    def _settle(
        self,
        index: int,
        given: Mapping[str, Tensor],
        transposed: set[str],
        common: Sequence[Inputs],
        own: Sequence[Inputs],
        linears: Mapping[str, nn.Module],
    ) -> tuple[LiveBlock, Mapping[str, FinalTensor]]:
        """Call the method. Where several processes settle a block, all end with the same tensors, bit by bit, but those of their experts.

        common, own: statistics of layers that all processes hold, and of this process's experts. All processes settle the common layers,
        and the method shares out its work. Each settles its own experts by itself.
        """
        group, device, method = self.plan.group, self.plan.device, self.method
        live = self._live_block(index, given, transposed, linears, group)
        if not method.by_group:
            return live, self._same_everywhere(method.settle(live, [*common, *own], device))
        alone = self._live_block(index, given, transposed, linears, ALONE)
        settled = {} if not own else method.settle(alone, own, device)
        return live, {**self._same_everywhere(method.settle(live, common, device)), **settled}

    def _same_everywhere(self, settled: Mapping[str, FinalTensor]) -> Mapping[str, FinalTensor]:
        common = {name: final for name, final in settled.items() if not self._owned(name)}
        return {**settled, **same_everywhere(self.plan.group, common)}

    def _join(self, outcome: BlockOutcome) -> BlockOutcome:
        """Bring what is to be written and reported of all processes' experts to the first process."""
        own = {name: final for name, final in outcome.settled.items() if self._owned(name)}
        brought = bring_to_first(self.plan.group, own, self.plan.device)
        unseen = dict.fromkeys(name for names in self.plan.group.collect(outcome.unseen) for name in names)
        return replace(outcome, unseen=tuple(unseen), brought=brought)

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
        own = [name for name in given if self._owned(name)] if group.size > 1 else ()
        if self.lessons is not None:
            return LiveBlock(given, block, lessons=self.lessons.of_block(index, linears), group=group)
        probe = None if self.method.by_group else self.forward.probe(index)
        if probe is None:
            return LiveBlock(given, block, group=group, own=own)
        return LiveBlock(given, block, *probe, transposed, group=group, own=own)


def _transposed(name: str, tensor: FinalTensor) -> FinalTensor:
    """A settled weight in the layout [in, out]."""
    assert tensor.tensors.keys() == {name}, "codes can't be transposed"
    weight = tensor.weight.t().contiguous()
    return FinalTensor(weight=weight, tensors={name: weight}, effect=tensor.effect, joined=tensor.joined)
