"""The calibration samples' hidden states, and running them through one block after the other."""

from itertools import chain
from pathlib import Path

from torch import Tensor

from nightpress.core.compress.executors.blocks.method import CacheStandIn
from nightpress.core.compress.executors.blocks.plan import BlockPlan
from nightpress.core.compress.executors.calls import Calls
from nightpress.core.compress.executors.hidden_states import HiddenStates
from nightpress.core.compress.executors.live_block import PROBE_TOKENS
from nightpress.core.compress.executors.watch import Watched
from nightpress.core.compress.model.experts import Experts
from nightpress.core.compress.model.skeleton import Batch, Call


class ForwardPass:
    """All samples between two blocks. Only the calling thread touches it."""

    def __init__(self, plan: BlockPlan, cache: CacheStandIn | None, folder: Path) -> None:
        """cache: given to watched blocks in place of a key/value cache; folder: for a file of hidden states that fill the memory."""
        self._plan, self._cache, self._folder = plan, cache, folder
        self._rows: list[
            HiddenStates
        ] = []  #: of each row of blocks that was entered: what came out of it, or is on its way
        self._calls = Calls(plan.device)
        self._probe: tuple[int, list[tuple[int, Call]]] | None = None  #: length of a text, and the blocks' calls for it

    @property
    def hidden(self) -> HiddenStates:
        return self._rows[-1]

    def enter_row(self, row: int) -> None:
        """Capture what enters a row of blocks [samples, length, width], and what each of its blocks is given beside it."""
        plan = self._plan
        starts = range(0, plan.total, plan.batch)
        batches = ({name: tensor[at : at + plan.batch] for name, tensor in plan.samples.items()} for at in starts)
        earlier = [list(states) for states in self._rows]
        hidden: HiddenStates | None = None
        self._calls = Calls(plan.device)
        self._probe = None
        asked = batches if row else chain([_probe_of(plan.samples)], batches)
        captured = plan.skeleton.capture(row, asked, earlier)
        if not row:
            entered, calls = next(captured)
            self._probe = entered.shape[1], calls
        for number, (entered, calls) in enumerate(captured):
            if hidden is None:
                shape = (plan.total, *entered.shape[1:])
                hidden = HiddenStates(shape, plan.batch, entered.dtype, plan.device, self._folder)
            hidden.put(number, entered.clone())
            self._calls.add(calls, keep_on=hidden.device)
        assert hidden is not None
        self._rows.append(hidden)

    def runs(self, index: int) -> int:
        """How often a block runs on a batch."""
        return self._calls.runs(index)

    def through(self, index: int, number: int, batch: Tensor, watched: Watched | None = None) -> Tensor:
        """A batch [B, L, width] after all runs of a block."""
        block, calls = self._plan.skeleton.blocks[index].module, self._calls.of(index, number)
        for mixture in self.experts_of(index):
            real = self.real(number)
            mixture.real = None if real is None else real.flatten()
        for at, call in enumerate(calls, 1):
            beside: dict[str, object] = {}
            if watched is not None:
                watched.stops, watched.real = at == len(calls), self.real(number)
                if self._cache is not None:
                    self._cache.real, beside = watched.real, {"past_key_values": self._cache}
            out = block(batch, *call.args, **{**call.kwargs, **beside})
            batch = out[0] if isinstance(out, tuple) else out
        return batch

    def advance_batch(self, index: int, number: int) -> None:
        """Run a batch through a block; what comes out takes the place of what went in."""
        self.hidden.put(number, self.through(index, number, self.hidden.take(number)))

    def advance(self, index: int) -> None:
        """Run all batches through a block."""
        for number in range(len(self.hidden)):
            self.advance_batch(index, number)

    def real(self, number: int) -> Tensor | None:
        """Which of a batch's tokens are no padding, bool [B, L] on the device; None if all."""
        if self._plan.real is None:
            return None
        start = number * self._plan.batch
        return self._plan.real[start : start + self._plan.batch].to(self._plan.device)

    def experts_of(self, index: int) -> list[Experts]:
        return [mixture for _, mixture in self._plan.skeleton.experts(index)]

    def probe(self, index: int) -> tuple[Tensor, list[Call]] | None:
        """The beginning of the first sample as it enters a block [1, L, width], and the block's calls for it; None behind the first row."""
        if self._probe is None:
            return None
        length, calls = self._probe
        for mixture in self.experts_of(index):
            mixture.real = None if self._plan.real is None else self._plan.real[0, :length].to(self._plan.device)
        return self.hidden.look_at(0)[:1, :length], [call for at, call in calls if at == index]


def _probe_of(samples: Batch) -> Batch:
    """The beginning of the first text, or the first image."""
    return {name: tensor[:1] if tensor.dim() > 2 else tensor[:1, :PROBE_TOKENS] for name, tensor in samples.items()}
