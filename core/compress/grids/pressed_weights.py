"""The weights of a pressed model in the form that exporters need: float arrays, or the codes that a pass chose."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nightpress.core.compress.grids.gguf_blocks import read_blocks
from nightpress.core.compress.grids.grid import LARGEST_FLOAT, Grid
from nightpress.core.compress.grids.packing import unpack_bits
from nightpress.core.compress.grids.stored import unpack_e2m1
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.recipes.gguf_types import GgufType, blocks_of
from nightpress.core.recipes.schemes import BLOCK

_PACKED = "_packed"


@dataclass(frozen=True)
class Codes:
    """A linear weight on an integer grid: ŵ = scale · (code − zero point)."""

    bits: int
    codes: NDArray[np.int8]  #: [out, in], −2^(bits−1) … 2^(bits−1)−1
    scale: NDArray[np.float32]  #: [out, groups]
    zero_point: NDArray[np.int8] | None  #: [out, groups]; None: symmetric

    @property
    def group_size(self) -> int:
        return int(self.codes.shape[1] // self.scale.shape[1])

    def dequantize(self) -> NDArray[np.float32]:
        """ŵ [out, in]"""
        grouped = self.codes.reshape(*self.scale.shape, -1).astype(np.float32)
        if self.zero_point is not None:
            grouped -= self.zero_point[:, :, None]
        return (grouped * self.scale[:, :, None]).reshape(self.codes.shape)

    def take_rows(self, order: NDArray[np.intp]) -> "Codes":
        """The same weight with its rows in another order."""
        zeros = None if self.zero_point is None else self.zero_point[order]
        return Codes(self.bits, self.codes[order], self.scale[order], zeros)

    def in_blocks(self, size: int) -> "Codes":
        """The same numbers with one scale for each `size` inputs. `size` must divide the group size."""
        times = self.group_size // size
        zeros = None if self.zero_point is None else np.repeat(self.zero_point, times, axis=1)
        return Codes(self.bits, self.codes, np.repeat(self.scale, times, axis=1), zeros)


class PressedWeights:
    """The tensors of a model folder under their names in the float model, whether or not a pass has packed them."""

    def __init__(self, model_dir: Path) -> None:
        self._source = SourceTensors.in_folder(model_dir)
        self._packed = {name.removesuffix(_PACKED) for name in self._source.names() if name.endswith(_PACKED)}
        parts = {f"{name}_{part}" for name in self._packed for part in ("packed", "scale", "shape", "zero_point")}
        #: Weight → the tensor that holds its GGUF blocks
        self._blocked = {found[0]: name for name in self._source.names() if (found := blocks_of(name)) is not None}
        self.names = sorted(
            self._packed | set(self._blocked) | (set(self._source.names()) - parts - set(self._blocked.values()))
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def packed(self) -> frozenset[str]:
        """The names of the weights that a pass has packed."""
        return frozenset(self._packed)

    @property
    def integers(self) -> frozenset[str]:
        """Those of the packed weights whose codes are integers in 32-bit words, as `codes` reads them. The others are fp4."""
        return frozenset(name for name in self._packed if self._source.stored(f"{name}_packed").info.dtype == "I32")

    @property
    def coded(self) -> frozenset[str]:
        """The names of the weights that a pass has replaced by codes of any kind and scales."""
        return frozenset(name for name in self.names if f"{name}_scale" in self._source)

    def block_type(self, name: str) -> GgufType | None:
        """The type of the GGUF blocks that a pass has rounded a weight to; None: it has none."""
        found = blocks_of(self._blocked.get(name, ""))
        return None if found is None else found[1]

    def block_bytes(self, name: str) -> NDArray[np.uint8]:
        """The GGUF blocks of a weight: [out, bytes of a row]."""
        stored: NDArray[np.uint8] = self._source.read(self._blocked[name]).numpy()
        return stored

    def shape(self, name: str) -> tuple[int, ...]:
        if (kind := self.block_type(name)) is not None:
            rows, width = self._source.stored(self._blocked[name]).info.shape
            return rows, width // kind.block_bytes * kind.block
        if name in self._packed:
            if name not in self.integers:
                rows, pairs = self._source.stored(f"{name}_packed").info.shape  # two fp4 numbers in a byte
                return rows, 2 * pairs
            rows, columns = self._source.read(f"{name}_shape").tolist()
            return int(rows), int(columns)
        return self._source.stored(name).info.shape

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers. False if one of them is packed or missing."""
        if {name, other} & self._packed or not {name, other} <= set(self.names):
            return False
        if {name, other} & set(self._blocked):
            same_type = self.block_type(name) == self.block_type(other)
            return same_type and np.array_equal(self.block_bytes(name), self.block_bytes(other))
        return torch.equal(self._source.read(name), self._source.read(other))

    def grid(self, name: str) -> Grid:
        """The grid of a packed weight. Its group size is never None."""
        groups = self._source.stored(f"{name}_scale").info.shape[1]
        return Grid(self._bits(name), self.shape(name)[1] // groups, f"{name}_zero_point" not in self._source)

    def _bits(self, name: str) -> int:
        return _bits(self._source.stored(f"{name}_packed").info.shape[1], self.shape(name)[1])

    def codes(self, name: str, rows: NDArray[np.int64] | None = None) -> Codes:
        """The codes of a packed weight. rows: some of its outputs only, which is much faster for a large weight; None: all."""
        count, columns = self.shape(name)
        at = slice(None) if rows is None else torch.from_numpy(rows)
        bits, zeros = self._bits(name), None
        if f"{name}_zero_point" in self._source:
            packed = self._source.read(f"{name}_zero_point")  # packed along the output dimension
            zeros = unpack_bits(packed.t().contiguous(), bits, count).t()[at].contiguous().numpy()
        codes = unpack_bits(self._source.read(f"{name}_packed")[at], bits, columns)
        return Codes(bits, codes.numpy(), self._source.read(f"{name}_scale")[at].float().numpy(), zeros)

    def rows(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows of a weight, dequantized: [rows, in]. The kind of codes and scales is told by their dtypes and shapes."""
        if name in self.integers:
            return self.codes(name, rows).dequantize()
        if (kind := self.block_type(name)) is not None:
            return read_blocks(self.block_bytes(name)[rows], kind)
        at = torch.from_numpy(rows)
        if f"{name}_scale" not in self._source:
            floats: NDArray[np.float32] = self._source.read(name)[at].to(torch.float32).numpy()
            return floats
        scale = self._source.read(f"{name}_scale")
        if name in self._packed:
            codes = unpack_e2m1(self._source.read(f"{name}_packed")[at])
            scales = (
                _bytes_of(scale)[at].view(torch.float8_e8m0fnu if scale.dtype == torch.uint8 else scale.dtype).float()
            )
            if f"{name}_global_scale" in self._source:
                scales = scales / self._source.read(f"{name}_global_scale")
            wide = scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
        else:
            written = self._source.read(name)
            codes, scale = _bytes_of(written)[at].view(written.dtype).float(), scale.float()
            if scale.dim() == 2 and scale.shape == (len(written), 1):
                wide = scale[at]
            elif scale.dim() == 2:  # a scale for each block
                wide = scale[at // BLOCK].repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
            else:
                wide = scale
        found: NDArray[np.float32] = (codes * wide).numpy()
        return found

    def input_peak(self, name: str) -> float | None:
        """The largest input that a layer rounds without cutting it off; None: it keeps its inputs, or finds their scales at run time."""
        total = f"{name.removesuffix('weight')}input_global_scale"
        if total in self._source:
            return LARGEST_FLOAT[8] * LARGEST_FLOAT[4] / float(self._source.read(total))
        scale = f"{name.removesuffix('weight')}input_scale"
        if scale not in self._source:
            return None
        largest = 127 if self._source.stored(name).info.dtype == "I8" else LARGEST_FLOAT[8]
        return float(self._source.read(scale).float()) * largest

    def floats(self, name: str) -> NDArray[np.float32]:
        """The tensor in float32, dequantized if it is packed."""
        if name in self._packed:
            return self.codes(name).dequantize()
        if (kind := self.block_type(name)) is not None:
            return read_blocks(self.block_bytes(name), kind)
        array: NDArray[np.float32] = self._source.read(name).to(torch.float32).numpy()
        return array


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor as bytes: torch can't pick rows of 8-bit floats. Other dtypes are returned as they are."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _bits(words: int, columns: int) -> int:
    """The number of bits of a packed weight's codes, from the number of 32-bit words in a row."""
    return next(bits for bits in range(1, 9) if -(-columns * bits // 32) == words)
