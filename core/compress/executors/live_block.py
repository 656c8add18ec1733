"""A block as a method gets it: its tensors, and a way to run the block with other tensors."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nightpress.core.compress.model.rows import Call
from nightpress.core.compress.model.skeleton import Batch, Block
from nightpress.core.compress.ranks.group import ALONE, Group

PROBE_TOKENS = 128  #: first tokens of the first calibration text: the probe, on which methods may run a block


class Lessons(Protocol):
    """Runs a block on all calibration samples with a method's weights, and compares its outputs with the source model's.

    The executor calls a method that gets lessons within `reproducible`.
    """

    @property
    def batches(self) -> int:
        """The number of batches of samples."""

    @property
    def step_batches(self) -> int:
        """The number of batches of a learning step."""

    def put(self, name: str, weight: Tensor) -> nn.Parameter:
        """Give a layer of the block another weight [out, in]. Returns it as a leaf of the graph of gradients.

        name: of the layer's weight in the files.
        """

    def round_inputs(self, name: str, rule: Callable[[Tensor], Tensor]) -> None:
        """Let a layer of the block round its inputs while `squared_error` runs. name: as in `put`."""

    def squared_error(self, batch: int) -> Tensor | None:
        """Σ (y − ŷ)² over the width and the tokens of a batch in this process, float32 []; None: it has none of its samples.

        Padding does not count. Differentiable in the weights.
        """

    def tell(self, done: float) -> None:
        """Report the progress within the block: 0 … 1."""


@dataclass(frozen=True)
class Called:
    """A call of a module of a block. Tensors are told by their memory and size: a view of a tensor counts as the tensor."""

    name: str  #: of the module in the block
    given: tuple[int, int]  #: its first input
    made: tuple[int, int]  #: its first output


def group_of(block: Mapping[str, Tensor], name: str | None = None) -> Group:
    """The processes that settle a block's tensors: this one alone if they are no `LiveBlock`.

    name: of a tensor; if it is in this process alone, so is the one that settles it.
    """
    return block.group if isinstance(block, LiveBlock) and name not in block.own else ALONE


def probe_of(samples: Batch) -> Batch:
    """The probe: the first tokens of the first text, or the first image."""
    return {name: tensor[:1] if tensor.dim() > 2 else tensor[:1, :PROBE_TOKENS] for name, tensor in samples.items()}


class LiveBlock(Mapping[str, Tensor]):
    """The tensors of a block by their names in the files, in their stored dtype. Every matrix is [out, in].

    Only those that this process holds, if several processes share out the block's experts.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        block: Block,
        entered: Tensor | None = None,
        calls: Sequence[Call] = (),
        turned: Collection[str] = (),
        lessons: Lessons | None = None,
        group: Group = ALONE,
        own: Collection[str] = (),
    ) -> None:
        """entered [1, L, width]: the probe's hidden states at the block's input; None: the block can't be run.

        calls: the block's other arguments, one entry for each run. turned: names of tensors that the block's layers hold as [in, out].
        lessons: given to methods that learn. group: the processes that settle the same tensors, which may share out the work.
        own: names of the tensors that are in this process alone, i.e. those of its experts.
        """
        self._tensors, self._block, self._turned = tensors, block, turned
        self._entered, self._calls = entered, calls
        self.lessons, self.group, self.own = lessons, group, frozenset(own)
        self.warnings: list[str] = []  #: warnings about the block for the report
        self.figures: dict[str, float] = {}  #: figures of the block for the report, by name

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def runs(self) -> bool:
        """Whether the block can be run, i.e. whether `answers` may be called."""
        return self._entered is not None

    @property
    def device(self) -> torch.device:
        """The device on which the block runs."""
        assert self._entered is not None
        return self._entered.device

    @property
    def told_apart(self) -> bool:
        """Whether this is one of the model's repeated blocks. False: it is the whole model."""
        return self._block.path != ""

    @property
    def module(self) -> nn.Module:
        return self._block.module

    @property
    def names(self) -> Mapping[str, str]:
        """Parameter of the module → its name in the files."""
        return {short: name for short, name in self._block.names.items() if name in self._tensors}

    def trace(self) -> list[Called]:
        """Run the block on the probe. Returns the calls of its modules, in the order in which they end."""
        calls: list[Called] = []
        alive: list[Any] = []  #: the tensors of the run, so that no two have the same address

        def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            made = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor) and isinstance(made, Tensor):
                alive.extend((first, made))
                calls.append(Called(name, _place(first), _place(made)))

        with ExitStack() as stack:
            for name, module in self._block.module.named_modules():
                hook = partial(_noted, note, name)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            for _ in self.answers([{}]):
                pass
        return calls

    def answers(self, trials: Iterable[Mapping[str, Tensor]]) -> Iterator[Tensor]:
        """For each trial, run the block on the probe with the trial's tensors in place of its own. Yields [1, L, width] in float32.

        trials: tensors by their names in the files, matrices as [out, in].
        """
        assert self._entered is not None
        own = {name: self._for_the_module(name, tensor) for name, tensor in self._tensors.items()}
        entered = _as_float(self._entered)
        calls = [tree_map(_as_float, (call.args, dict(call.kwargs))) for call in self._calls]
        for trial in trials:
            weights = own | {name: self._for_the_module(name, tensor) for name, tensor in trial.items()}
            hidden, parameters = entered, {short: weights[name] for short, name in self.names.items()}
            for args, kwargs in calls:
                out = torch.func.functional_call(self._block.module, parameters, (hidden, *args), kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
            del trial, weights, parameters  # frees this trial's tensors before the next is made
            yield hidden

    def _for_the_module(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in float32, on the block's device, in its layer's layout."""
        assert self._entered is not None
        in_float = tensor.to(self._entered.device).float()  # in one step, the host would convert it
        return in_float.t() if name in self._turned else in_float


def _noted(note: Any, name: str, _module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    note(name, args, kwargs, out)


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), tensor.numel()


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
