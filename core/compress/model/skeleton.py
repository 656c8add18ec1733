"""A transformers model without weights. They are loaded part by part: first those outside the blocks, then one block after the other.

A model is seen as embeddings and rows of blocks, so that no family needs code of its own. A row is an outermost ModuleList with linear
layers in it. The blocks' arguments other than the hidden states are recorded in a run in which blocks return the hidden states unchanged.
An encoder-decoder has two rows; the output of the first is known when the second is recorded. A block may run more than once (ALBERT).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nightpress.core.compress.model.experts import Experts, take_apart
from nightpress.core.compress.model.modules import fit
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import SHARED_BLOCKS

Batch = Mapping[str, Tensor]  #: the model's inputs by argument name, each [samples, …]


@dataclass(frozen=True)
class Call:
    """A block's arguments other than the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """One block of a row."""

    row: int
    path: str  #: of the module in the model
    module: nn.Module
    names: Mapping[str, str]  #: parameter of the module → its name in the files, in the files' order

    @property
    def name(self) -> str:
        """The block's name in the files."""
        short, stored = next(iter(self.names.items()))
        return stored.removesuffix(f".{short}")


class Skeleton:
    """The model's modules without weights, and the name of each weight in the files."""

    def __init__(self, folder: Path, source: SourceTensors, device: str, dtype: torch.dtype) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModel

        self.source, self.device, self.dtype = source, torch.device(device), dtype
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.config.use_cache = False
        with init_empty_weights(include_buffers=False), _NothingAllocated():
            self.model: nn.Module = AutoModel.from_config(self.config, dtype=dtype)
        self.model.eval().requires_grad_(False)
        take_apart(self.model, self.config.model_type)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self._names = _names_in_files(self.model, source)
        self.rows = find_rows(self.model)
        #: By row: the number of values that its blocks return after the hidden states. None: they return no tuple.
        self._beside: dict[int, int | None] = {}
        self.blocks = [
            self._describe(row, f"{path}.{index}", block)
            for row, (path, blocks) in enumerate(self.rows)
            for index, block in enumerate(blocks)
        ]

    def _describe(self, row: int, path: str, module: nn.Module) -> Block:
        names = {}
        for name, _ in module.named_parameters():
            stored = self._names.get(f"{path}.{name}")
            if stored is None:
                raise _unsupported(f"The files have no tensor {path}.{name}, which the model's class wants")
            names[name] = stored
        order = {name: at for at, name in enumerate(self.source.names())}
        return Block(row, path, module, dict(sorted(names.items(), key=lambda pair: order[pair[1]])))

    def block_names(self, index: int) -> list[str]:
        """All tensors of a block in the files, in the files' order."""
        return list(self.blocks[index].names.values())

    def short_names(self, index: int) -> dict[str, str]:
        """Name in the files → name within the block. The latter is the same in all blocks of a row that have the same layers."""
        return {stored: name for name, stored in self.blocks[index].names.items()}

    def linears(self, index: int) -> dict[str, nn.Module]:
        """The linear layers of a block, by the names of their weights in the files."""
        block = self.blocks[index]
        return {
            block.names[f"{name}.weight"]: layer for name, layer in block.module.named_modules() if is_linear(layer)
        }

    def experts(self, index: int) -> list[tuple[str, Experts]]:
        """The mixtures of experts in a block: (prefix of the experts' names in the files, mixture)."""
        block = self.blocks[index]
        found = []
        for path, module in block.module.named_modules():
            if isinstance(module, Experts):
                stored = next(name for key, name in block.names.items() if key.startswith(f"{path}.0."))
                found.append((stored[: stored.index(".experts.0.") + len(".experts.")], module))
        return found

    def fill_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Load a block's weights and return its module.

        tensors: by their names in the files, on any device. Tensors that are not the block's are ignored.
        """
        block = self.blocks[index]
        filled = {
            name: tensors[stored].to(self.device, self.dtype, non_blocking=True) for name, stored in block.names.items()
        }
        fit(block.module, {name: tuple(tensor.shape) for name, tensor in filled.items()})
        block.module.load_state_dict(filled, strict=False, assign=True)
        return block.module

    def empty_block(self, index: int) -> None:
        """Free a block's weights."""
        for module in self.blocks[index].module.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def capture(
        self, row: int, batches: Iterable[Batch], came_out: Sequence[Sequence[Tensor]]
    ) -> Iterator[tuple[Tensor, list[tuple[int, Call]]]]:
        """For each batch: the hidden states at a row's input [B, L, H], and the calls of its blocks in order: (index of the block, call).

        came_out: for each earlier row and each batch, the output of the row [B, L, H].
        """
        self._fill_rest()
        first = next(at for at, block in enumerate(self.blocks) if block.row == row)
        self.fill_block(first, {name: self.source.read(name) for name in self.block_names(first)})
        path, blocks = self.rows[row]
        shared = self.config.model_type in SHARED_BLOCKS
        tape = _Tape(runs=int(self.config.num_hidden_layers) if shared else len(blocks))
        try:
            self._put(path, [_Recorder(block, first + at, tape) for at, block in enumerate(blocks)])
            for at, batch in enumerate(batches):
                for earlier, out in enumerate(came_out):
                    count, (other, others) = self._beside[earlier], self.rows[earlier]
                    answer = out[at].to(self.device)
                    self._put(
                        other,
                        [_Replay(block, answer if count is None else (answer, *[None] * count)) for block in others],
                    )
                yield self._run(batch, tape)
                self._beside[row] = tape.beside
        finally:
            for other, others in self.rows[: row + 1]:
                holder, leaf = _parent(self.model, other)
                setattr(holder, leaf, others)
            self.empty_block(first)
            for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
                if not any(name.startswith(f"{path}.") for path, _ in self.rows):
                    holder, leaf = _parent(self.model, name)
                    holder._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _put(self, path: str, stand_ins: "list[_StandIn]") -> None:
        holder, leaf = _parent(self.model, path)
        setattr(holder, leaf, nn.ModuleList(stand_ins))

    def _run(self, batch: Batch, tape: "_Tape") -> tuple[Tensor, list[tuple[int, Call]]]:
        try:
            self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()})
        except _ForwardEnded:
            return tape.take()
        raise _unsupported("The model's blocks don't run one after the other")

    def _fill_rest(self) -> None:
        """Load the weights outside the blocks. Weights that the files lack stay empty, e.g. of an untrained pooler: it never runs here."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        filled: dict[str, nn.Parameter] = {}
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            stored = self._names.get(name) or self._names.get(tied.get(name, ""))
            if parameter.is_meta and not any(name.startswith(f"{path}.") for path, _ in self.rows) and stored:
                if stored not in filled:
                    value = self.source.read(stored).to(self.device, self.dtype)
                    filled[stored] = nn.Parameter(value, requires_grad=False)
                holder, leaf = _parent(self.model, name)
                holder._parameters[leaf] = filled[stored]


class _NothingAllocated(TorchFunctionMode):
    """Makes weights on the meta device. Layers make weights with `torch.empty`; buffers are made with values and are not affected.

    Making and dropping a weight per layer would be enough, but malloc does not return freed chunks to the system. The process would take as
    much address space as the whole model, and a limit on the address space may be lower.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        elsewhere = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **elsewhere})


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: its weight is [out, in], or [in, out] in GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


class _ForwardEnded(Exception):  # noqa: N818 (nothing went wrong)
    pass


class _Tape:
    """The calls that the recorders of a row have recorded for the current batch."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._entered: Tensor | None = None
        self._calls: list[tuple[int, Call]] = []
        #: Whether to run the first block: its values after the hidden states are unknown, or may differ from batch to batch.
        self._asks = True
        self._beside: tuple[Any, ...] | None = None  #: None: the blocks return no tuple

    def hear(self, index: int, block: nn.Module, hidden: Tensor, call: Call) -> Any:
        """Record a call. Returns the block's output with unchanged hidden states. Raises _ForwardEnded after the row's last call."""
        if self._entered is None:
            self._entered = hidden
            if self._asks:
                out = block(hidden, *call.args, **call.kwargs)
                self._beside = tuple(out[1:]) if isinstance(out, tuple) else None
                self._asks = any(value is not None for value in self._beside or ())
        self._calls.append((index, call))
        if len(self._calls) == self._runs:
            raise _ForwardEnded
        return hidden if self._beside is None else (hidden, *self._beside)

    @property
    def beside(self) -> int | None:
        return None if self._beside is None else len(self._beside)

    def take(self) -> tuple[Tensor, list[tuple[int, Call]]]:
        assert self._entered is not None
        taken = self._entered, self._calls
        self._entered, self._calls = None, []
        return taken


class _StandIn(nn.Module):
    """A module that replaces a block. It has the block's attributes, because some models read the block's kind of attention."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # hidden from nn.Module, so that the block is no submodule of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Recorder(_StandIn):
    """Records its calls on the tape."""

    def __init__(self, block: nn.Module, index: int, tape: _Tape) -> None:
        super().__init__(block)
        self._index, self._tape = index, tape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        return self._tape.hear(self._index, self.__dict__["block"], hidden, Call(args[1:], kwargs))


class _Replay(_StandIn):
    """Replaces a block of an earlier row: always returns the output of the row's last block."""

    def __init__(self, block: nn.Module, answer: Any) -> None:
        super().__init__(block)
        self._answer = answer

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._answer


def _names_in_files(model: nn.Module, source: SourceTensors) -> dict[str, str]:
    """Parameter of the model → its name in the files, by transformers' own rules for old and other names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [renaming for renaming in get_model_conversion_mapping(model) if isinstance(renaming, WeightRenaming)]
    known = dict(model.named_parameters(remove_duplicate=False))
    names: dict[str, str] = {}
    for stored in source.names():
        name, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, known)
        if name in known:
            names[name] = stored
    return names


def find_rows(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The rows of blocks with their paths, in the order in which they run."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(is_linear(inner) for inner in module.modules())
    ]
    outermost = [
        (name, module)
        for name, module in found
        if not any(name.startswith(other + ".") for other, _ in found if other != name)
    ]
    if len(outermost) != 1 and [name.split(".")[0] for name, _ in outermost] != ["encoder", "decoder"]:
        raise _unsupported(f"The model has {len(outermost)} rows of blocks")
    return outermost


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    above, _, leaf = path.rpartition(".")
    return model.get_submodule(above), leaf


def _unsupported(what: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        f"{what}, so it can't be calibrated block by block.",
        hint="Use `weight-only` or `magnitude`, which need no calibration.",
    )
