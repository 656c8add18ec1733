"""A transformers model whose weights are brought in part by part: first what stands before its blocks, then one block after another.

Every family that is a row of like blocks behind an embedding works without being named: the blocks are the outermost list of modules
that holds linear layers, and what each of them is given beside the hidden states is recorded from a run in which they only pass on.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.compress.checkpoint import TORCH_DTYPES, Shard, StoredTensor
from core.errors import ErrorCode, NightpressError

#: Families whose blocks share their weights, so that no block can be finished before the last one ran.
_SHARED_BLOCKS = frozenset({"albert"})


@dataclass(frozen=True)
class Call:
    """What a block is given beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Source:
    """The tensors of shards by name, read when asked for."""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self.shards = shards
        self._places = {one.name: (shard, one) for shard in self.shards for one in shard.tensors}

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        return list(self._places)

    def stored(self, name: str) -> StoredTensor:
        return self._places[name][1]

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        shard, stored = self._places[name]
        return _read(shard, stored)


def _read(shard: Shard, stored: StoredTensor) -> Tensor:
    data = torch.empty(stored.info.size, dtype=torch.uint8)
    with shard.path.open("rb", buffering=0) as file:
        file.seek(stored.offset)
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        while len(view):
            count = file.readinto(view)
            if not count:
                raise NightpressError(
                    ErrorCode.MALFORMED_MODEL,
                    f"{shard.path.name} became shorter while it was read.",
                    hint="Leave the model's files alone while a job runs.",
                )
            view = view[count:]
    return data.view(TORCH_DTYPES[stored.info.dtype]).view(stored.info.shape)


class Skeleton:
    """The model's modules without weights, and where in the files each weight lies."""

    def __init__(self, folder: Path, source: Source, device: str, dtype: torch.dtype) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModel

        self.source, self.device, self.dtype = source, torch.device(device), dtype
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.use_cache = False
        if config.model_type in _SHARED_BLOCKS:
            raise _unsupported(f"The blocks of a {config.model_type} share their weights")
        with init_empty_weights(include_buffers=False):
            self.model: nn.Module = AutoModel.from_config(config, dtype=dtype)
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self.path, self.blocks = _find_blocks(self.model)
        self._prefix = self._find_prefix()

    def stored_name(self, name: str) -> str | None:
        """A parameter of the bare model, as the files call it; None if they don't have it."""
        stored = self._prefix + name
        if stored not in self.source and "LayerNorm." in stored:  # what TensorFlow called it, in the oldest files
            stored = (
                stored.removesuffix("weight") + "gamma"
                if stored.endswith("weight")
                else stored.removesuffix("bias") + "beta"
            )
        return stored if stored in self.source else None

    def block_prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with in the files."""
        return f"{self._prefix}{self.path}.{index}."

    def block_names(self, index: int) -> list[str]:
        """All tensors of a block in the files, in the files' order."""
        prefix = self.block_prefix(index)
        return [name for name in self.source.names() if name.startswith(prefix)]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of a block, by the names of their weights in the files."""
        prefix, modules = self.block_prefix(index), self.blocks[index].named_modules()
        return {f"{prefix}{name}.weight": one for name, one in modules if isinstance(one, nn.Linear)}

    def fill_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Give a block its weights: tensors by their names in the files, on any device. Others of the block are passed over."""
        block = self.blocks[index]
        filled = {}
        for name, _ in block.named_parameters():
            stored = self.stored_name(f"{self.path}.{index}.{name}")
            if stored is None:
                raise _unsupported(
                    f"The files have no tensor {self.block_prefix(index)}{name}, which the model's class wants"
                )
            filled[name] = tensors[stored].to(self.device, self.dtype, non_blocking=True)
        block.load_state_dict(filled, strict=False, assign=True)
        return block

    def empty_block(self, index: int) -> None:
        """Take a block's weights away again."""
        _empty(self.blocks[index])

    def capture(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[Call]]]:
        """For each batch of token ids [B, L] what enters the first block [B, L, H], and what every block is given beside it."""
        self._fill_rest()
        first = self.blocks[0]
        recorders = [_Recorder(block) for block in self.blocks]
        holder, last = _parent(self.model, self.path)
        setattr(holder, last, nn.ModuleList(recorders))
        try:
            for at, ids in enumerate(batches):
                if at == 0:
                    recorders[0].stops = True
                    self._run(ids)
                    entered, call = recorders[0].take()
                    filled = self.fill_block(0, {name: self.source.read(name) for name in self.block_names(0)})
                    out = filled(entered, *call.args, **call.kwargs)
                    beside = len(out) - 1 if isinstance(out, tuple) else None
                    _empty(first)
                    for recorder in recorders:
                        recorder.beside, recorder.stops = beside, recorder is recorders[-1]
                self._run(ids)
                taken = [recorder.take() for recorder in recorders]
                yield taken[0][0], [call for _, call in taken]
        finally:
            setattr(holder, last, self.blocks)
            for name, child in self.model.named_parameters():
                if not name.startswith(self.path + "."):
                    child_holder, leaf = _parent(self.model, name)
                    child_holder._parameters[leaf] = nn.Parameter(child.to("meta"), requires_grad=False)

    def _run(self, ids: Tensor) -> None:
        try:
            self.model(input_ids=ids.to(self.device))
        except _Stop:
            return
        raise _unsupported("The model's blocks don't run one after the other")

    def _fill_rest(self) -> None:
        """What stands outside the blocks, as far as the files have it: a pooler that no one trained is never run here."""
        for name, parameter in list(self.model.named_parameters()):
            stored = self.stored_name(name)
            if parameter.is_meta and not name.startswith(self.path + ".") and stored is not None:
                holder, leaf = _parent(self.model, name)
                value = self.source.read(stored).to(self.device, self.dtype)
                holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _find_prefix(self) -> str:
        probe = next(name for name, _ in self.model.named_parameters() if name.startswith(self.path + ".0."))
        for prefix in ("", f"{self.model.base_model_prefix}.", "model."):
            if prefix + probe in self.source:
                return prefix
        raise _unsupported(f"The files have no tensor {probe}, which the model's class wants")


class _Stop(Exception):  # noqa: N818 (nothing went wrong)
    pass


class _Recorder(nn.Module):
    """Stands for a block: keeps what it was called with, and passes the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a module of this one: it is only asked for its attributes
        self.stops = False
        self.beside: int | None = None  #: how much a block returns beside the hidden states; None: no tuple at all
        self._taken: tuple[Tensor, Call] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self._taken = hidden, Call(args[1:], kwargs)
        if self.stops:
            raise _Stop
        return hidden if self.beside is None else (hidden, *[None] * self.beside)

    def take(self) -> tuple[Tensor, Call]:
        assert self._taken is not None
        taken, self._taken = self._taken, None
        return taken

    def __getattr__(self, name: str) -> Any:
        """Some models ask a block for its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    found = [
        (name, one)
        for name, one in model.named_modules()
        if isinstance(one, nn.ModuleList) and any(isinstance(inner, nn.Linear) for inner in one.modules())
    ]
    outermost = [
        (name, one)
        for name, one in found
        if not any(name.startswith(other + ".") for other, _ in found if other != name)
    ]
    if len(outermost) != 1:
        raise _unsupported(f"The model has {len(outermost)} rows of blocks")
    return outermost[0]


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    above, _, leaf = path.rpartition(".")
    return model.get_submodule(above), leaf


def _empty(block: nn.Module) -> None:
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _unsupported(what: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        f"{what}, so it can't be calibrated block by block.",
        hint="Use `weight-only` or `magnitude`, which need no calibration.",
    )
