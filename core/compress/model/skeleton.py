"""A transformers model without weights. They are loaded part by part: first those outside the blocks, then one block after the other.

A model is seen as embeddings and rows of blocks, so that no family needs code of its own; `rows` finds them. The blocks' arguments other than
the hidden states are recorded in a run in which blocks return the hidden states unchanged. An encoder-decoder has two rows; the output of the
first is known when the second is recorded. A block may run more than once (ALBERT). A model whose blocks can't be run one after the other is
a single block, which holds all of it.

Several processes may each hold a part of a mixture's experts. All other weights are in each of them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nightpress.core.compress.model.expert_exchange import ExpertExchange
from nightpress.core.compress.model.experts import Experts
from nightpress.core.compress.model.modules import fit
from nightpress.core.compress.model.on_meta import Built, build, lacking
from nightpress.core.compress.model.rows import (
    Call,
    ForwardEnded,
    NoRows,
    Recorder,
    Replay,
    Row,
    Tape,
    Whole,
    is_linear,
    order_of_calls,
    possible_rows,
    unsupported,
)
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.ranks.group import ALONE, Group

_EXPERT = re.compile(r".*\.experts\.\d+\.")  #: the part of a tensor's name in the files that names its expert

Batch = Mapping[str, Tensor]  #: the model's inputs by argument name, each [samples, …]


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

    def __init__(
        self,
        folder: Path,
        source: SourceTensors,
        device: str,
        dtype: torch.dtype,
        example: Batch,
        group: Group = ALONE,
    ) -> None:
        """example: a few tokens of a text, or an image, on which the order of the blocks is found.

        group: processes that share out the experts. All of them make the skeleton, with the same example.
        """
        self.source, self.device, self.dtype = source, torch.device(device), dtype
        self._built: Built = build(folder, source.names(), dtype)
        self.model, self.config = self._built.model, self._built.model.config
        for module in self.model.modules():
            if hasattr(module, "config"):  # an encoder and a decoder have configs of their own
                module.config.use_cache = False
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self._names = self._built.names
        self._order = {name: at for at, name in enumerate(source.names())}
        self._candidates = tuple(f"{path}." for path, _ in possible_rows(self.model))
        self.rows: list[Row] = []
        self.whole: str | None = None  #: why the model is a single block; None: it has rows of blocks
        self._rank = group.rank
        self._owners: dict[str, int] = {}  #: prefix of an expert's tensors in the files → rank of its process
        if group.size > 1:
            self._share_out(group)
        self._arrange(example)

    def _share_out(self, group: Group) -> None:
        """Share out the experts of each block that has one mixture, and at least one expert for each process."""
        for path, row in possible_rows(self.model):
            for at, block in enumerate(row):
                found = [(name, inner) for name, inner in block.named_modules() if isinstance(inner, Experts)]
                if len(found) != 1 or len(found[0][1]) < group.size:
                    continue
                name, mixture = found[0]
                exchange = mixture.exchange = ExpertExchange(group, len(mixture))
                for short, _ in mixture.named_parameters():
                    stored = self._names[f"{path}.{at}.{name}.{short}"]
                    prefix = _EXPERT.match(stored)
                    assert prefix is not None, stored
                    self._owners[prefix[0]] = exchange.owner(int(short.split(".")[0]))

    def _arrange(self, example: Batch) -> None:
        candidates = possible_rows(self.model)
        found = dict(candidates)
        filled: list[Block] = []

        def fill(path: str, at: int) -> nn.Module:
            block = self._describe(0, f"{path}.{at}", found[path][at])
            filled.append(block)
            return self._fill(
                block, {name: self.source.read(name) for name in block.names.values() if self.holds(name)}
            )

        try:
            self._fill_rest()
            self.rows = order_of_calls(candidates, self._put, lambda: self._forward(example), fill)
            self.blocks = [
                self._describe(row, f"{found_row.path}.{at}", block)
                for row, found_row in enumerate(self.rows)
                for at, block in enumerate(found_row.blocks)
            ]
        except NoRows as why:
            self.whole = str(why)
        finally:
            for block in filled:
                self._empty(block)
            self._empty_rest()
        if self.whole is not None:
            self._owners = {}
            for module in self.model.modules():
                if isinstance(module, Experts):
                    module.exchange = None
            if (name := lacking(self._built)) is not None:
                raise unsupported(f"The files have no tensor {name}, which the model's class wants")
            inputs = "pixel_values" if "pixel_values" in example else "input_ids"
            self.rows = [Row("", nn.ModuleList(), (0,), None)]
            self.blocks = [self._describe(0, "", Whole(self.model, inputs))]

    def _describe(self, row: int, path: str, module: nn.Module) -> Block:
        start = f"{path}." if path else ""
        names = {}
        for name, _ in module.named_parameters(remove_duplicate=bool(path)):
            inner = start + name if path else name.removeprefix("model.")
            stored = self._names.get(inner) or self._names.get(self._built.tied.get(inner, ""))
            if stored is not None:
                names[name] = stored
            elif path:
                raise unsupported(f"The files have no tensor {inner}, which the model's class wants")
        return Block(row, path, module, dict(sorted(names.items(), key=lambda pair: self._order[pair[1]])))

    def block_names(self, index: int) -> list[str]:
        """All tensors of a block in the files, in the files' order."""
        return list(dict.fromkeys(self.blocks[index].names.values()))

    def owner(self, name: str) -> int | None:
        """The rank of the only process that holds a tensor, by its name in the files. None: all processes hold it.

        Also for what a method writes for a weight, whose name begins like the weight's.
        """
        expert = _EXPERT.match(name) if self._owners else None
        return None if expert is None else self._owners.get(expert[0])

    def holds(self, name: str) -> bool:
        """Whether this process holds a tensor, by its name in the files."""
        return self.owner(name) in (None, self._rank)

    def held_names(self, index: int) -> list[str]:
        """The tensors of a block that this process holds, in the files' order."""
        return [name for name in self.block_names(index) if self.holds(name)]

    @property
    def shares_any_experts(self) -> bool:
        """Whether several processes hold the experts of some block."""
        return bool(self._owners)

    def shares_experts(self, index: int) -> bool:
        """Whether several processes hold a block's experts. Then all of them must run it equally often."""
        return any(mixture.exchange is not None for _, mixture in self.experts(index))

    def short_names(self, index: int) -> dict[str, str]:
        """Name in the files → name within the block. The latter is the same in all blocks of a row that have the same layers."""
        return {stored: name for name, stored in self.blocks[index].names.items()}

    def linears(self, index: int) -> dict[str, nn.Module]:
        """The linear layers of a block that this process holds, by the names of their weights in the files."""
        block = self.blocks[index]
        found = {
            block.names[f"{name}.weight"]: layer
            for name, layer in block.module.named_modules()
            if is_linear(layer) and f"{name}.weight" in block.names
        }
        return {name: layer for name, layer in found.items() if self.holds(name)}

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
        """Load a block's weights that this process holds, and return its module.

        tensors: by their names in the files, on any device. Tensors that are not the block's are ignored.
        """
        return self._fill(self.blocks[index], tensors)

    def _fill(self, block: Block, tensors: Mapping[str, Tensor]) -> nn.Module:
        filled = {
            name: tensors[stored].to(self.device, self.dtype, non_blocking=True)
            for name, stored in block.names.items()
            if self.holds(stored)
        }
        fit(block.module, {name: tuple(tensor.shape) for name, tensor in filled.items()})
        block.module.load_state_dict(filled, strict=False, assign=True)
        if not block.path:  # what the files lack and the model runs, it runs with zeros
            for module in block.module.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.is_meta:
                        zeros = torch.zeros(parameter.shape, dtype=self.dtype, device=self.device)
                        module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        return block.module

    def empty_block(self, index: int) -> None:
        """Free a block's weights."""
        self._empty(self.blocks[index])

    def _empty(self, block: Block) -> None:
        for module in block.module.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def capture(
        self, row: int, batches: Iterable[Batch], came_out: Sequence[Sequence[Tensor]]
    ) -> Iterator[tuple[Tensor, list[tuple[int, Call]]]]:
        """For each batch: the hidden states at a row's input [B, L, H], and the calls of its blocks in order: (index of the block, call).

        came_out: for each earlier row and each batch, the output of the row [B, L, H].
        """
        if self.whole is not None:
            yield from map(self._as_hidden, batches)
            return
        self._fill_rest()
        first = next(at for at, block in enumerate(self.blocks) if block.row == row)
        self.fill_block(first, {name: self.source.read(name) for name in self.held_names(first)})
        found = self.rows[row]
        tape = Tape(runs=len(found.order))
        try:
            self._put(
                found.path,
                nn.ModuleList(Recorder(block, first + at, tape) for at, block in enumerate(found.blocks)),
            )
            for at, batch in enumerate(batches):
                for earlier, out in enumerate(came_out):
                    other, answer = self.rows[earlier], out[at].to(self.device)
                    given = answer if other.beside is None else (answer, *[None] * other.beside)
                    self._put(other.path, nn.ModuleList(Replay(block, given) for block in other.blocks))
                yield self._run(batch, tape)
        finally:
            for other in self.rows[: row + 1]:
                self._put(other.path, other.blocks)
            self.empty_block(first)
            self._empty_rest()

    def _as_hidden(self, batch: Batch) -> tuple[Tensor, list[tuple[int, Call]]]:
        """The inputs of a model that is a single block, in place of hidden states."""
        inputs = "pixel_values" if "pixel_values" in batch else "input_ids"
        given = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return given.pop(inputs), [(0, Call((), given))]

    def _put(self, path: str, blocks: nn.ModuleList) -> None:
        holder, leaf = _parent(self.model, path)
        setattr(holder, leaf, blocks)

    def _forward(self, batch: Batch) -> object:
        with torch.no_grad():
            given = {name: tensor.to(self.device) for name, tensor in batch.items()}
            given = {
                name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()
            }
            return self.model(**given)

    def _run(self, batch: Batch, tape: Tape) -> tuple[Tensor, list[tuple[int, Call]]]:
        try:
            self._forward(batch)
        except ForwardEnded:
            return tape.take()
        raise unsupported("The model's blocks don't run one after the other")

    def _fill_rest(self) -> None:
        """Load the weights outside the blocks. Weights that the files lack are zeros, e.g. of an untrained pooler: no block reads its output."""
        filled: dict[str, nn.Parameter] = {}
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            stored = self._names.get(name) or self._names.get(self._built.tied.get(name, ""))
            if not parameter.is_meta or name.startswith(self._candidates):
                continue
            key = stored or name
            if key not in filled:
                value = self.source.read(stored) if stored else torch.zeros(parameter.shape)
                filled[key] = nn.Parameter(value.to(self.device, self.dtype), requires_grad=False)
            holder, leaf = _parent(self.model, name)
            holder._parameters[leaf] = filled[key]

    def _empty_rest(self) -> None:
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(self._candidates):
                holder, leaf = _parent(self.model, name)
                holder._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    above, _, leaf = path.rpartition(".")
    return model.get_submodule(above), leaf
