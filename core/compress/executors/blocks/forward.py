"""Runs the hidden states of the calibration samples through one block after the other."""

from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from nightpress.core.compress.executors.batches import count_of
from nightpress.core.compress.executors.blocks.method import CacheStandIn
from nightpress.core.compress.executors.blocks.plan import BlockPlan
from nightpress.core.compress.executors.calls import Calls
from nightpress.core.compress.executors.hidden_states import HiddenStates
from nightpress.core.compress.executors.watch import Watched
from nightpress.core.compress.model.experts import Experts
from nightpress.core.compress.model.rows import Call, with_cache


class ForwardPass:
    """The hidden states of all samples between two blocks. Only the main thread of a run uses it."""

    def __init__(self, plan: BlockPlan, cache: CacheStandIn | None, folder: Path) -> None:
        """cache: passed to watched blocks in place of a key/value cache. folder: for a file of hidden states that memory does not hold."""
        self._plan, self.cache, self._folder = plan, cache, folder
        #: For each row of blocks that was entered: the outputs of its last block, or the present hidden states within the row.
        self._rows: list[HiddenStates] = []
        self._calls = Calls(plan.device)
        #: Tokens of the probe, and the blocks' calls for it.
        self._probe: tuple[int, list[tuple[int, Call]]] | None = None

    @property
    def hidden(self) -> HiddenStates:
        return self._rows[-1]

    def enter_row(self, row: int) -> None:
        """Capture the hidden states at the input of a row of blocks [samples, length, width], and the other arguments of its blocks."""
        plan = self._plan
        batches = ({name: tensor[rows] for name, tensor in plan.samples.items()} for rows in plan.batches)
        earlier = [list(states) for states in self._rows]
        hidden: HiddenStates | None = None
        self._calls = Calls(plan.device)
        self._probe = None
        asked = batches if row else chain([plan.probe], batches)
        captured = plan.skeleton.capture(row, asked, earlier)
        if not row:
            entered, calls = next(captured)
            self._probe = entered.shape[1], calls
        for number, (entered, calls) in enumerate(captured):
            if hidden is None:
                shape = (count_of(plan.samples), *entered.shape[1:])
                sizes = [part.stop - part.start for part in plan.batches]
                hidden = HiddenStates(shape, sizes, entered.dtype, plan.device, self._folder, plan.group.size)
            hidden.put(number, entered.clone())
            self._calls.add(calls, keep_on=hidden.device)
        assert hidden is not None
        self._rows.append(hidden)

    def runs(self, index: int) -> int:
        """How often a block runs in one forward pass of a batch."""
        return self._calls.runs(index)

    def rounds(self, index: int) -> range:
        """The numbers of the batches with which a block is run. A process may have no batch of the last number, and still take part."""
        return range(self._plan.rounds if self._plan.skeleton.shares_experts(index) else len(self.hidden))

    def take_part(self, index: int) -> None:
        """Run this process's experts of a block while other processes run a batch, and this one has none."""
        for _ in range(self.runs(index)):
            for mixture in self.experts_of(index):
                mixture.take_part()

    def run_batch(self, index: int, number: int, batch: Tensor, watched: Watched | None = None) -> Tensor:
        """The output [B, L, width] of a batch after all runs of a block. `watched` collects the inputs of its layers in these runs."""
        block, calls = self._plan.skeleton.blocks[index].module, self._calls.of(index, number)
        for mixture in self.experts_of(index):
            real = self.real(number)
            mixture.real = None if real is None else real.flatten()
        may_stop = self._plan.skeleton.whole is None and not self._plan.skeleton.shares_experts(index)
        for at, call in enumerate(calls, 1):
            if watched is not None:
                watched.stops, watched.real = at == len(calls) and may_stop, self.real(number)
                if self.cache is not None and self.cache.sees(self._plan.skeleton.blocks[index].names.values()):
                    self.cache.real = watched.real
                    call = with_cache(block, call, self.cache)
            out = block(batch, *call.args, **call.kwargs)
            batch = out[0] if isinstance(out, tuple) else out
        return batch

    def advance_batch(self, index: int, number: int) -> None:
        """Run a batch through a block. The output replaces the batch's hidden states."""
        self.hidden.put(number, self.run_batch(index, number, self.hidden.take(number)))

    def advance(self, index: int) -> None:
        """Run all batches through a block."""
        for number in self.rounds(index):
            if number < len(self.hidden):
                self.advance_batch(index, number)
            else:
                self.take_part(index)

    def real(self, number: int) -> Tensor | None:
        """Which of a batch's tokens are no padding: bool [B, L] on the device. None if all of them."""
        if self._plan.real is None:
            return None
        return self._plan.real[self._plan.batches[number]].to(self._plan.device)

    def experts_of(self, index: int) -> list[Experts]:
        return [mixture for _, mixture in self._plan.skeleton.experts(index)]

    def probe(self, index: int) -> tuple[Tensor, list[Call]] | None:
        """The probe's hidden states [1, L, width] at a block's input, and the block's calls for it. None after the first row of blocks."""
        if self._probe is None:
            return None
        length, calls = self._probe
        real = self._plan.probe_real
        for mixture in self.experts_of(index):
            mixture.real = None if real is None else real[0, :length].to(self._plan.device)
        entered = self.hidden.look_at(0)[:1, :length]
        if self._plan.group.size > 1:  # the first process has the first text
            entered = entered.clone(memory_format=torch.contiguous_format)
            self._plan.group.hand_round(entered)
        return entered, [call for at, call in calls if at == index]
