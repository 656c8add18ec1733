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
from nightpress.core.compress.executors.side_by_side import side_by_side
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
    #: What is to be written for tensors whose weights are not kept: they are in their layers, or in another process.
    done: Mapping[str, Written] = field(default_factory=dict)

    @property
    def written(self) -> dict[str, Written]:
        """What is to be written, by the name of the tensor that it is written for."""
        own = {name: Written(final.tensors, final.effect) for name, final in self.settled.items()}
        return {**own, **self.done}

    def without_weights(self) -> "BlockOutcome":
        """The same outcome, without the settled weights."""
        return replace(self, settled={}, done=self.written)

    def __or__(self, later: "BlockOutcome") -> "BlockOutcome":
        return BlockOutcome(
            {**self.settled, **later.settled},
            self.unseen + later.unseen,
            self.undersampled + later.undersampled,
            self.warnings + later.warnings,
            self.figures + later.figures,
            {**self.done, **later.done},
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
        common, own = self._told_apart(inputs)
        with naming([name for names in layers for name in names]):
            live, settled = self._settle(index, given, transposed, common, own, linears)
        return BlockOutcome(
            settled={
                name: _transposed(name, tensor) if name in transposed else tensor for name, tensor in settled.items()
            },
            unseen=tuple(name for seen in inputs if seen.statistic.tokens == 0 for name in seen.names),
            warnings=tuple(live.warnings),
            figures=tuple(live.figures.items()),
        )

    def in_parts(self, index: int) -> bool:
        """Whether a block may be settled in `parts`. Only a mixture's statistics are so large that it is worth it."""
        return self.method.by_group and bool(self.plan.skeleton.experts(index))

    def parts(
        self, tensors: Mapping[str, Tensor], inputs: Sequence[Inputs], linears: Mapping[str, nn.Module]
    ) -> list[Sequence[Inputs]]:
        """Divide a block's statistics into parts that are settled one after the other. A part is what a method settles side by side anyway.

        The parts that several processes settle together come first, and are the same in all of them. The number of parts of a process's own
        experts may differ.
        """
        common, own = self._told_apart(inputs)
        weights = {name: tensors[name].t() if is_conv1d(layer) else tensors[name] for name, layer in linears.items()}
        return [part for held in (common, own) for part in side_by_side(weights, held, self.plan.device)]

    def put(self, layer: nn.Module, weight: Tensor) -> None:
        """Give a layer its settled weight, in the layer's layout."""
        layer.weight = nn.Parameter(self.placed(weight), requires_grad=False)

    def placed(self, weight: Tensor) -> Tensor:
        """A weight on the block's device, in the dtype in which the block runs."""
        return weight.to(self.plan.device, self.plan.skeleton.dtype)

    def join(self, index: int, outcome: BlockOutcome) -> BlockOutcome:
        """Bring what is to be written and reported of all processes' experts to the first process."""
        if not self.plan.skeleton.shares_experts(index):
            return outcome
        own = {name: written for name, written in outcome.written.items() if self._owned(name)}
        brought = bring_to_first(self.plan.group, own, self.plan.device)
        unseen = dict.fromkeys(name for names in self.plan.group.collect(outcome.unseen) for name in names)
        return replace(outcome, unseen=tuple(unseen), done={**outcome.done, **brought})

    def _told_apart(self, inputs: Sequence[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
        """The statistics of layers that all processes hold, and those of this process's own experts."""
        own = [seen for seen in inputs if self._owned(seen.names[0])]
        return [seen for seen in inputs if not self._owned(seen.names[0])], own

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
        shared = {} if not common else self._same_everywhere(method.settle(live, common, device))
        return live, {**shared, **settled}

    def _same_everywhere(self, settled: Mapping[str, FinalTensor]) -> Mapping[str, FinalTensor]:
        common = {name: final for name, final in settled.items() if not self._owned(name)}
        return {**settled, **same_everywhere(self.plan.group, common)}

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
