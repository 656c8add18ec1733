"""Finds how a model's repeated blocks follow each other, by running the model with stand-ins in place of its blocks.

A row is an outermost ModuleList with linear layers in it. A stand-in records its call and returns the hidden states unchanged. So each block
must be given the very tensor that the block before it returned: else the model does something between its blocks, and they can't be run one
after the other. Nothing here knows a family by name.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nightpress.core.compress.ranks.group import PeerError
from nightpress.core.errors import ErrorCode, NightpressError


@dataclass(frozen=True)
class Call:
    """A block's arguments other than the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of blocks that the model runs on the samples."""

    path: str  #: of the ModuleList in the model
    blocks: nn.ModuleList
    order: tuple[int, ...]  #: the blocks in the order of their calls, by their index in the row
    beside: int | None  #: number of values that the blocks return after the hidden states; None: they return no tuple


class NoRows(Exception):  # noqa: N818 (it says what the model is, not what went wrong)
    """The model's blocks can't be run one after the other. Its text says why."""


class ForwardEnded(Exception):  # noqa: N818 (nothing went wrong)
    """Raised when the last block of a row has been called: the rest of the forward pass is not needed."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: its weight is [out, in], or [in, out] in GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def possible_rows(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the outermost ModuleLists with linear layers in them, with their paths, in the model's order."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(other + ".") for other, _ in found)
        if isinstance(module, nn.ModuleList) and not inside and any(is_linear(inner) for inner in module.modules()):
            found.append((name, module))
    return found


def find_rows(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the rows of blocks of a model whose rows run in the model's order: one, or an encoder's and a decoder's.

    Raises NightpressError(unsupported_architecture) for other models.
    """
    rows = possible_rows(model)
    if len(rows) != 1 and [name.split(".")[0] for name, _ in rows] != ["encoder", "decoder"]:
        raise unsupported(f"The model has {len(rows)} rows of blocks")
    return rows


def order_of_calls(
    rows: Sequence[tuple[str, nn.ModuleList]],
    put: Callable[[str, nn.ModuleList], None],
    run: Callable[[], object],
    fill: Callable[[str, int], nn.Module],
) -> list[Row]:
    """Run the model with stand-ins for all blocks, and return the rows that it runs, in the order in which it runs them.

    put: sets a row in the model. run: runs the model on some samples. fill: loads the weights of a block, by its row's path and its index.
    Raises NoRows if the blocks can't be run one after the other.
    """
    trial = _Trial(fill)
    try:
        for path, blocks in rows:
            put(path, nn.ModuleList(_Watched(block, path, at, trial) for at, block in enumerate(blocks)))
        run()
    except (NoRows, NightpressError, PeerError):
        raise
    except Exception as error:  # whatever a model raises when it is given stand-ins
        raise NoRows(f"without its blocks it fails: {type(error).__name__}: {str(error)[:200]}") from error
    finally:
        for path, blocks in rows:
            put(path, blocks)
    found = dict(rows)
    entered = list(dict.fromkeys(path for path, _ in trial.calls))
    if not entered:
        raise NoRows("it has no repeated blocks")
    for path, order in ((path, [at for row, at in trial.calls if row == path]) for path in entered):
        if order != sorted(order):
            raise NoRows("a block runs again after others have run")
        if set(order) != set(range(len(found[path]))):
            raise NoRows("it leaves out some of its blocks")
    if [path for path, _ in trial.calls] != sorted((path for path, _ in trial.calls), key=entered.index):
        raise NoRows("its rows of blocks take turns")
    return [
        Row(path, found[path], tuple(at for row, at in trial.calls if row == path), trial.beside[path])
        for path in entered
    ]


class StandIn(nn.Module):
    """A module that replaces a block. It has the block's attributes, because some models read the block's kind of attention."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # hidden from nn.Module, so that the block is no submodule of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Trial:
    """The calls of the stand-ins in one run of the model."""

    def __init__(self, fill: Callable[[str, int], nn.Module]) -> None:
        self.calls: list[tuple[str, int]] = []  #: (path of the row, index of the block)
        self.beside: dict[str, int | None] = {}
        self._fill = fill
        self._after: dict[str, tuple[Any, ...] | None] = {}
        self._last: dict[str, Tensor] = {}

    def hear(self, path: str, at: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Note a call, and return what the block would, with unchanged hidden states. Runs the first block of each row."""
        hidden, call = split_call(args, kwargs)
        if any(map(_keeps_state, (*call.args, *call.kwargs.values()))):
            raise NoRows("its blocks hand values on beside the hidden states")
        if path not in self._last:
            out = self._fill(path, at)(*args, **kwargs)
            first = out[0] if isinstance(out, tuple) else out
            if not isinstance(first, Tensor) or first.shape != hidden.shape:
                raise NoRows("its blocks return other things than hidden states")
            self._after[path] = tuple(out[1:]) if isinstance(out, tuple) else None
            self.beside[path] = len(out) - 1 if isinstance(out, tuple) else None
        elif self._last[path] is not hidden:
            raise NoRows("it changes the hidden states between its blocks")
        self._last[path] = hidden
        self.calls.append((path, at))
        after = self._after[path]
        return hidden if after is None else (hidden, *after)


class _Watched(StandIn):
    def __init__(self, block: nn.Module, path: str, at: int, trial: _Trial) -> None:
        super().__init__(block)
        self.__dict__["told"] = (path, at, trial)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        path, at, trial = self.__dict__["told"]
        return trial.hear(path, at, args, kwargs)


class Tape:
    """The calls that the recorders of a row have recorded for the current batch."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._entered: Tensor | None = None
        self._calls: list[tuple[int, Call]] = []
        #: Whether to run the first block: its values after the hidden states are unknown, or may differ from batch to batch.
        self._asks = True
        self._beside: tuple[Any, ...] | None = None  #: None: the blocks return no tuple

    def hear(self, index: int, block: nn.Module, hidden: Tensor, call: Call) -> Any:
        """Record a call. Returns the block's output with unchanged hidden states. Raises ForwardEnded after the row's last call."""
        if self._entered is None:
            self._entered = hidden
            if self._asks:
                out = block(hidden, *call.args, **call.kwargs)
                self._beside = tuple(out[1:]) if isinstance(out, tuple) else None
                self._asks = any(value is not None for value in self._beside or ())
        self._calls.append((index, call))
        if len(self._calls) == self._runs:
            raise ForwardEnded
        return hidden if self._beside is None else (hidden, *self._beside)

    def take(self) -> tuple[Tensor, list[tuple[int, Call]]]:
        assert self._entered is not None
        taken = self._entered, self._calls
        self._entered, self._calls = None, []
        return taken


class Recorder(StandIn):
    """Records its calls on the tape."""

    def __init__(self, block: nn.Module, index: int, tape: Tape) -> None:
        super().__init__(block)
        self._index, self._tape = index, tape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = split_call(args, kwargs)
        return self._tape.hear(self._index, self.__dict__["block"], hidden, call)


class Replay(StandIn):
    """Replaces a block of an earlier row: always returns the output of the row's last block."""

    def __init__(self, block: nn.Module, answer: Any) -> None:
        super().__init__(block)
        self._answer = answer

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._answer


class Whole(nn.Module):
    """A whole model as a single block. Its hidden states are its inputs: token ids [B, L], or pixels."""

    def __init__(self, model: nn.Module, inputs: str) -> None:
        """inputs: the name of the model's argument that stands for the hidden states."""
        super().__init__()
        self.model, self._inputs = model, inputs

    def forward(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = self.model(**{self._inputs: inputs}, **kwargs)[0]
        return out


def split_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """Return a block's hidden states, and its other arguments."""
    if args:
        return args[0], Call(args[1:], kwargs)
    name = next((name for name in ("hidden_states", *kwargs) if isinstance(kwargs.get(name), Tensor)), "")
    if not name:
        raise NoRows("its blocks are given no hidden states")
    return kwargs[name], Call((), {key: value for key, value in kwargs.items() if key != name})


def with_cache(block: nn.Module, call: Call, cache: object) -> Call:
    """Return the call with `cache` as the block's `past_key_values`, which some models hand on by its place."""
    names = list(inspect.signature(block.forward).parameters)[1:]  # without the hidden states
    at = names.index("past_key_values") if "past_key_values" in names else len(call.args)
    if at < len(call.args):
        return Call((*call.args[:at], cache, *call.args[at + 1 :]), call.kwargs)
    return Call(call.args, {**call.kwargs, "past_key_values": cache})


def _keeps_state(value: Any) -> bool:
    """Whether a value may be changed by the block that is given it: a cache, or a list or dict that blocks fill."""
    if value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device):
        return False
    if isinstance(value, tuple):
        return any(_keeps_state(part) for part in value)
    if isinstance(value, list | dict):
        parts = list(value.values()) if isinstance(value, dict) else value
        return not parts or any(_keeps_state(part) for part in parts)
    return True


def unsupported(what: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        f"{what}, so it can't be calibrated block by block.",
        hint="Use `weight-only` or `magnitude`, which need no calibration.",
    )
