"""The options of `k-quants`."""

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, blocks_cost
from nightpress.core.recipes.gguf_types import GGUF_TYPES, GgufType, gguf_type
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import invalid, is_token_embedding
from nightpress.core.recipes.passes.base import Calibrated, ExportFormat, Relation

EvenType = Literal["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
#: Types whose codes are found by ggml's own quantizer
IqType = Literal["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs"]
UnevenType = IqType | Literal["tq1_0", "tq2_0", "mxfp4"]
TypeName = EvenType | UnevenType
_HEAD = "lm_head.weight"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class KQuants(Calibrated):
    """Round linear weights onto the grids of GGUF's own types, column after column as `gptq` does, for llama.cpp.

    The ranges of each block are fitted with the inputs' power as importance and rounded to the bits that the type has for them, before the
    codes are chosen. So the file holds exactly the numbers that the pass computed with. Rows that blocks of 256 don't divide take the
    type that llama.cpp would take there, or one of the same size.

    The codes of the types IQ, TQ and MXFP4, whose steps are uneven, are found by llama.cpp's own quantizer with the same importance. The
    worker needs `llama-cpp-python` for them. IQ1 and IQ2 take it much longer than the others.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"gguf"})
    last: ClassVar[bool] = True
    relation: ClassVar[Relation] = "quantized"

    pass_: Literal["k-quants"] = Field("k-quants", alias="pass")
    type: TypeName = Field("q4_k", description="The type of linear weights.")
    table: EvenType = Field(
        "q6_k",
        description="The type of the token embeddings and of an output head that is not tied to them. They are rounded to nearest.",
    )
    bits_per_weight: float | None = Field(
        None,
        gt=2,
        le=8.5,
        description="Mean bits of a rounded weight, tables and scales included. Each layer's error is measured for every candidate, and each gets the type that helps most. `type` then has no effect.",
    )
    candidates: tuple[TypeName, ...] = Field(
        ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
        min_length=2,
        max_length=len(GGUF_TYPES),
        description="The types that `bits_per_weight` chooses from.",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="Added to the diagonal of the inputs' Gram matrix, as a share of its mean."
    )

    @model_validator(mode="after")
    def _a_type_or_a_mean(self) -> Self:
        if self.bits_per_weight is not None and self.type != type(self).model_fields["type"].default:
            raise ValueError("`type` and `bits_per_weight` both choose the types: name one of them")
        return self

    @property
    def types(self) -> tuple[TypeName, ...]:
        """The types that linear weights can get."""
        return (self.type,) if self.bits_per_weight is None else self.candidates

    def type_of(self, tensor: TensorInfo, name: str) -> GgufType:
        """Return the type of this name, or the type that replaces it for this tensor, which the pass takes."""
        kind = gguf_type(name, tensor.shape[-1])
        assert kind is not None
        return kind

    def size_of(self, tensor: TensorInfo, name: str) -> int:
        """Return the bytes of a tensor in the type of this name."""
        return tensor.shape[0] * self.type_of(tensor, name).row_bytes(tensor.shape[1])

    @property
    def rounding_bits(self) -> int | None:
        return min(GGUF_TYPES[name].bits for name in self.types)

    def describe(self) -> str:
        if self.bits_per_weight is None:
            return f"{self.type}, tables {self.table}"
        return f"{self.bits_per_weight:g} bits a weight from {', '.join(self.candidates)} by measured error, tables {self.table}"

    def takes_linear(self, tensor: TensorInfo) -> bool:
        return super().takes_linear(tensor) and gguf_type(self.type, tensor.shape[-1]) is not None

    def takes_table(self, tensor: TensorInfo) -> bool:
        """Return whether the tensor is a table over the vocabulary that the pass rounds."""
        table = is_token_embedding(tensor) or (tensor.name == _HEAD and tensor.dtype in _FLOATS)
        return table and gguf_type(self.table, tensor.shape[-1]) is not None

    def takes(self, tensor: TensorInfo) -> bool:
        return self.takes_linear(tensor) or self.takes_table(tensor)

    def check(self, header: ModelHeader) -> None:
        super().check(header)
        if self.bits_per_weight is not None:
            self.room(header.tensors)

    def room(self, tensors: Iterable[TensorInfo]) -> int:
        """Return the bytes that `bits_per_weight` leaves for the linear weights. tensors: all of the model.

        Raises NightpressError(invalid_recipe), with the smallest possible number, if the smallest types take more.
        """
        assert self.bits_per_weight is not None
        taken = [tensor for tensor in tensors if self.takes(tensor)]
        weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in taken)
        tables = sum(self.size_of(tensor, self.table) for tensor in taken if self.takes_table(tensor))
        least = sum(
            min(self.size_of(tensor, name) for name in self.candidates) for tensor in taken if self.takes_linear(tensor)
        )
        room = int(self.bits_per_weight * weights / 8) - tables
        if room < least:
            smallest = 8 * (least + tables) / weights
            raise invalid(
                f"`{self.name}`: {self.bits_per_weight:g} bits a weight is less than the smallest types take with the tables in {self.table}, {smallest:.3f}.",
                "Raise `bits_per_weight`, name a smaller type in `candidates`, or a smaller one for `table`.",
            )
        return room

    def stored_bytes(self, tensor: TensorInfo) -> int:
        if self.takes_table(tensor):
            return self.size_of(tensor, self.table)
        if not self.takes_linear(tensor):
            return tensor.size
        most = max(self.size_of(tensor, name) for name in self.types)
        if self.bits_per_weight is None:
            return most
        return min(most, int(self.bits_per_weight * tensor.shape[0] * tensor.shape[1] / 8))

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        once = blocks_cost(header, calibration, bits=self.rounding_bits, in_parts=True)
        return once.times(1 if self.bits_per_weight is None else 2)  # a sweep measures each layer's errors
