"""The types of GGUF's quantized matrices. No torch here.

A row is divided into blocks of 32 or 256 consecutive weights, and a block into parts that share a scale. A weight is scale · code − minimum,
with codes from 0 up, or scale · (code − half) in types without minima. In blocks of 256, the k-quants, the scales and minima are small
integers themselves, times a float16 of the block. The layouts are those of ggml's `ggml-common.h`.

Other types have uneven grids: tables of numbers or of whole groups of weights (IQ), three values (TQ), floats of 4 bits (MXFP4). Their
codes are found by ggml's own quantizer.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufType:
    """A type of blocks."""

    name: str
    bits: int  #: of a code; of an uneven grid, about as many
    block: int  #: weights of a block
    block_bytes: int
    part: int = 0  #: weights that share a scale; 0: the grid is uneven
    minimum: bool = False  #: whether parts have a minimum; without, the grid has one more step below zero than above it
    scale_bits: int | None = None  #: of a part's scale and minimum, an integer; None: float16

    @property
    def even(self) -> bool:
        """Whether the grid's steps are even, so that our solver can choose codes on it."""
        return self.part > 0

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
    GgufType("q2_k", 2, 256, 84, 16, True, 4),
    GgufType("q3_k", 3, 256, 110, 16, False, 6),
    GgufType("q4_k", 4, 256, 144, 32, True, 6),
    GgufType("q5_k", 5, 256, 176, 32, True, 6),
    GgufType("q6_k", 6, 256, 210, 16, False, 8),
    GgufType("q4_0", 4, 32, 18, 32, False, None),
    GgufType("q4_1", 4, 32, 20, 32, True, None),
    GgufType("q5_0", 5, 32, 22, 32, False, None),
    GgufType("q5_1", 5, 32, 24, 32, True, None),
    GgufType("q8_0", 8, 32, 34, 32, False, None),
    GgufType("iq1_s", 1, 256, 50),
    GgufType("iq1_m", 1, 256, 56),
    GgufType("iq2_xxs", 2, 256, 66),
    GgufType("iq2_xs", 2, 256, 74),
    GgufType("iq2_s", 2, 256, 82),
    GgufType("iq3_xxs", 3, 256, 98),
    GgufType("iq3_s", 3, 256, 110),
    GgufType("iq4_nl", 4, 32, 18),
    GgufType("iq4_xs", 4, 256, 136),
    GgufType("tq1_0", 2, 256, 54),
    GgufType("tq2_0", 2, 256, 66),
    GgufType("mxfp4", 4, 32, 17),
)
GGUF_TYPES = {kind.name: kind for kind in _ALL}
#: Type → the type that replaces it in rows that blocks of 256 don't divide. As in llama.cpp, it has no fewer bits.
NARROWER = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    **{kind.name: "iq4_nl" for kind in _ALL if kind.name.startswith("iq") and kind.block == 256},
}


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
    weight, mark, name = tensor.rpartition("weight_")
    return (f"{weight}weight", GGUF_TYPES[name]) if mark and name in GGUF_TYPES else None
