"""Passes that set weights to zero."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, blocks_cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import Divisor
from nightpress.core.recipes.passes.base import Calibrated, ExportFormat, OnLinears
from nightpress.core.recipes.passes.sparsity import Pattern, pattern_divisor, with_sparsity

_NO_GAIN = "Unstructured and N:M zeros make a dense model neither smaller nor faster in today's runtimes; the report measures it."


class Pruning(OnLinears):
    """A pass that sets a share of the weights of linear layers to zero."""

    exports: ClassVar[frozenset[ExportFormat]] = frozenset(
        {"safetensors", "compressed-tensors", "onnx", "openvino", "gguf", "mlx"}
    )

    sparsity: float = Field(
        0.5, gt=0, lt=1, description="Share of weights set to zero; with a pattern N:M it is 1 − N/M."
    )
    pattern: Pattern = "unstructured"

    @model_validator(mode="before")
    @classmethod
    def _pattern_gives_sparsity(cls, raw: object) -> object:
        return with_sparsity(raw)

    def describe(self) -> str:
        return f"{self.sparsity:.0%} zeros, {self.pattern}"

    def divisor(self) -> Divisor | None:
        return pattern_divisor(self.pattern)

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        yield _NO_GAIN
        yield from super().warnings(header)


class Magnitude(Pruning):
    """Set the weights of smallest magnitude (L1) to zero.

    `across: layer` prunes the same share of every layer; `across: global` compares the weights of all layers. `pattern: "2:4"` keeps the
    two largest of every four neighbours in a row. Zeros alone make a dense model neither smaller nor faster; the report states what they
    save.
    """

    pass_: Literal["magnitude"] = Field("magnitude", alias="pass")
    across: Literal["layer", "global"] = "layer"

    @model_validator(mode="after")
    def _within_rows(self) -> "Magnitude":
        if self.pattern != "unstructured" and self.across == "global":
            raise ValueError("a pattern N:M is decided within each row; leave `across` at `layer`")
        return self

    def describe(self) -> str:
        return f"{super().describe()}, by {self.across}"


class SparseGpt(Pruning, Calibrated):
    """Set the weights to zero whose loss changes the layer's output least; the other weights compensate for them (arXiv 2301.00774).

    Zeros alone make a dense model neither smaller nor faster; the report states what they save.
    """

    spreads: ClassVar[bool] = True
    pass_: Literal["sparsegpt"] = Field("sparsegpt", alias="pass")
    damping: float = Field(
        0.01, gt=0, le=1, description="Added to the diagonal of the inputs' Gram matrix, as a share of its mean."
    )


class Wanda(Pruning, Calibrated):
    """Set the weights of smallest magnitude times input norm to zero, row by row (arXiv 2306.11695). The other weights are unchanged.

    Zeros alone make a dense model neither smaller nor faster; the report states what they save.
    """

    spreads: ClassVar[bool] = True
    pass_: Literal["wanda"] = Field("wanda", alias="pass")

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return blocks_cost(header, calibration, gram=False, in_parts=True)
