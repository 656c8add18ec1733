"""The base class of the calibrated passes that round to integers or to fp4, and the options of `gptq`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from nightpress.core.recipes.linears import Divisor
from nightpress.core.recipes.passes.quantize import (
    INPUTS,
    Bits,
    Budgeted,
    RoundedInputs,
    check_inputs,
    inputs_divisor,
    rounded_inputs,
    with_float_format,
)
from nightpress.core.recipes.passes.sparsity import Pattern, pattern_divisor, with_sparsity
from nightpress.core.recipes.schemes import Scheme


class Formatted(Budgeted):
    """A pass whose codes are integers, or numbers of e2m1: `mxfp4` or `nvfp4`."""

    format: Literal["int", "mxfp4", "nvfp4"] = Field(
        "int",
        description="`int`: integers of `bits`. `mxfp4`: e2m1 with a power of two for each 32 inputs. `nvfp4`: e2m1 with an fp8 scale for each 16.",
    )
    bits: Bits = 4
    activations: RoundedInputs = Field("none", description=INPUTS)

    @model_validator(mode="before")
    @classmethod
    def _fixed_by_format(cls, raw: object) -> object:
        return with_float_format(raw)

    @model_validator(mode="after")
    def _floats_have_no_zero(self) -> Self:
        if self.format != "int" and (not self.symmetric or self.overrides or self.embeddings or self.chooses_bits):
            raise ValueError(
                f"`format: {self.format}` takes neither zero points, `overrides`, `embeddings`, a `budget` nor `within`"
            )
        if self.format != "int" and self.ranges == "half-quadratic":
            raise ValueError("half-quadratic ranges are for integers")
        check_inputs(self.format, self.activations)
        return self

    @property
    def _plain(self) -> Scheme:
        if self.format == "int":
            return super()._plain
        return Scheme(self.bits, "float", "group", self.group_size, activations=rounded_inputs(self.activations))

    def divisor(self) -> Divisor | None:
        return inputs_divisor(self.activations)


class Gptq(Formatted):
    """Round linear weights one column after another; the columns that follow compensate for each column's error (arXiv 2210.17323).

    With `sparsity` or a `pattern`, weights are also pruned by the same rule (SparseGPT). With a `budget`, each layer gets its bits by its
    measured error. The result is `pack-quantized`; with `format`, `mxfp4` or `nvfp4`.
    """

    pass_: Literal["gptq"] = Field("gptq", alias="pass")
    order: Literal["activation", "natural"] = Field(
        "activation",
        description="`activation`: columns of inputs with the most power are rounded first. The result has the same format and speed.",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="Added to the diagonal of the inputs' Gram matrix, as a share of its mean."
    )
    refine: bool = Field(True, description="Fit the scales again after the codes are chosen.")
    sparsity: float | None = Field(None, gt=0, lt=1, description="Share of the weights that are also set to zero.")
    pattern: Pattern = "unstructured"

    @model_validator(mode="before")
    @classmethod
    def _pattern_gives_sparsity(cls, raw: object) -> object:
        return with_sparsity(raw)

    @model_validator(mode="after")
    def _pattern_in_order(self) -> Self:
        if self.pattern != "unstructured" and self.order == "activation":
            raise ValueError("a pattern N:M needs `order: natural`")
        if self.sparsity is not None and self.format != "int":
            raise ValueError(f"no runtime skips the zeros of {self.format} weights: leave `sparsity` and `pattern` out")
        return self

    @property
    def rounding_bits(self) -> int | None:
        return super().rounding_bits if self.sparsity is None else None

    def describe(self) -> str:
        return super().describe() + (f", {self.sparsity:.0%} zeros" if self.sparsity is not None else "")

    def divisor(self) -> Divisor | None:
        return pattern_divisor(self.pattern) or super().divisor()
