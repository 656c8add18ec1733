"""The types of GGUF's quantized matrices. No torch here.

A row is divided into blocks of 32 or 256 consecutive weights, and a block into parts that share a scale. A weight is scale · code − minimum,
with codes from 0 up, or scale · (code − half) in types without minima. In blocks of 256, the k-quants, the scales and minima are small
integers themselves, times a float16 of the block. The layouts are those of ggml's `ggml-common.h`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufType:
    """A type of blocks."""

    name: str
    bits: int  #: of a code
    block: int  #: weights of a block
    part: int  #: weights that share a scale
    minimum: bool  #: whether parts have a minimum; without, the grid has one more step below zero than above it
    scale_bits: int | None  #: of a part's scale and minimum, an integer; None: float16
    block_bytes: int

    @property
    def half(self) -> int:
        """The code that stands for zero in a type without minima."""
        return int(2 ** (self.bits - 1))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row. The block must divide `columns`."""
        return columns // self.block * self.block_bytes


_ALL = (
    GgufType("q2_k", 2, 256, 16, True, 4, 84),
    GgufType("q3_k", 3, 256, 16, False, 6, 110),
    GgufType("q4_k", 4, 256, 32, True, 6, 144),
    GgufType("q5_k", 5, 256, 32, True, 6, 176),
    GgufType("q6_k", 6, 256, 16, False, 8, 210),
    GgufType("q4_0", 4, 32, 32, False, None, 18),
    GgufType("q4_1", 4, 32, 32, True, None, 20),
    GgufType("q5_0", 5, 32, 32, False, None, 22),
    GgufType("q5_1", 5, 32, 32, True, None, 24),
    GgufType("q8_0", 8, 32, 32, False, None, 34),
)
GGUF_TYPES = {kind.name: kind for kind in _ALL}
#: Type → the type that replaces it in rows that blocks of 256 don't divide. As in llama.cpp, it has no fewer bits.
NARROWER = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def gguf_type(name: str, columns: int) -> GgufType | None:
    """Return the type of this name, or the type that replaces it in rows of so many columns; None: no type's block divides them."""
    kind = GGUF_TYPES[name]
    if columns % kind.block:
        kind = GGUF_TYPES[NARROWER.get(name, name)]
    return kind if columns % kind.block == 0 else None


def blocks_name(weight: str, kind: GgufType) -> str:
    """Return the name of the tensor that holds a weight's blocks in a model's folder: bytes [out, bytes of a row]."""
    return f"{weight}_{kind.name}"


def blocks_of(tensor: str) -> tuple[str, GgufType] | None:
    """Return the weight whose blocks a tensor of this name holds, and their type; None: it holds no blocks."""
    weight, name = tensor[:-5], tensor[-4:]
    known = weight.endswith("weight") and tensor[-5:-4] == "_" and name in GGUF_TYPES
    return (weight, GGUF_TYPES[name]) if known else None
