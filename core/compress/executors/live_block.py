"""A block as a method gets it: its tensors, and the block itself, which can be run with other tensors."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nightpress.core.compress.model.skeleton import Block, Call

PROBE_TOKENS = 128  #: of the first calibration text, on which a block is tried


class LiveBlock(Mapping[str, Tensor]):
    """The tensors of a block by their names in the files, in their stored dtype, every matrix as [out, in]."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        block: Block,
        entered: Tensor | None = None,
        calls: Sequence[Call] = (),
        turned: Collection[str] = (),
    ) -> None:
        """entered [1, L, width]: the probe as it enters the block, None if the block can't be run; calls: what it is given beside, run by run;
        turned: the names of tensors that the block's layers hold as [in, out]."""
        self._tensors, self._block, self._turned = tensors, block, turned
        self._entered, self._calls = entered, calls
        self.warnings: list[str] = []  #: what a person should know of what was done to the block

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def runs(self) -> bool:
        """Whether `answers` can be asked for."""
        return self._entered is not None

    def answers(self, trials: Iterable[Mapping[str, Tensor]]) -> Iterator[Tensor]:
        """For each trial, the block's output for the probe [1, L, width] with the trial's tensors in place of its own: all in float32."""
        assert self._entered is not None
        own = {name: self._for_the_module(name, tensor) for name, tensor in self._tensors.items()}
        entered = self._entered.float()
        calls = [tree_map(_as_float, (call.args, dict(call.kwargs))) for call in self._calls]
        for trial in trials:
            weights = own | {name: self._for_the_module(name, tensor) for name, tensor in trial.items()}
            hidden, parameters = entered, {short: weights[name] for short, name in self._block.names.items()}
            for args, kwargs in calls:
                out = torch.func.functional_call(self._block.module, parameters, (hidden, *args), kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
            yield hidden

    def _for_the_module(self, name: str, tensor: Tensor) -> Tensor:
        """In float32 on the block's device, in its layer's layout."""
        assert self._entered is not None
        in_float = tensor.to(self._entered.device, torch.float32)
        return in_float.t() if name in self._turned else in_float


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
