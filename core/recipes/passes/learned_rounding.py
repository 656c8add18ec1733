"""The options of `learned-rounding`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, learning_cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes.quantize import Bits, Budgeted, with_float_format
from nightpress.core.recipes.schemes import Scheme, Strategy


class LearnedRounding(Budgeted):
    """Learn which way each linear weight is rounded, and the range of each scale, against each block's output (arXiv 2309.05516).

    Each block learns by signed gradient descent, from the nearest codes or GPTQ's. It takes much longer than `gptq` and
    loses less, most of all at 2 and 3 bits. The result is `pack-quantized`, or floats of 4 bits: `mxfp4` (a power of two for each 32
    inputs) and `nvfp4` (an fp8 scale for each 16 inputs).
    """

    pass_: Literal["learned-rounding"] = Field("learned-rounding", alias="pass")
    format: Literal["int", "mxfp4", "nvfp4"] = "int"
    bits: Bits = 4
    start: Literal["nearest", "better"] = Field(
        "nearest",
        description="The codes to start from: the nearest ones, or the better of these and GPTQ's at the block's output. GPTQ's fit the calibration text, and may do worse on other text.",
    )
    steps: int = Field(200, ge=10, le=10_000, description="Learning steps of each block.")
    batch: int = Field(8, ge=1, le=1024, description="Calibration samples of a step.")

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
        if self.format != "int" and self.start != "nearest":
            raise ValueError("GPTQ's codes are integers; leave `start` at `nearest`")
        if self.format != "int" and self.ranges == "half-quadratic":
            raise ValueError("half-quadratic ranges are for integers")
        return self

    @property
    def _plain(self) -> Scheme:
        if self.format == "int":
            return super()._plain
        strategy: Strategy = "group"
        return Scheme(self.bits, "float", strategy, self.group_size)

    def describe(self) -> str:
        return f"{super().describe()}, {self.steps} steps a block"

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        found = self._once(header, calibration).times(max(1, self.tries(header)))
        if not self.chooses_bits:
            return found
        # The sweep that measures each layer's error learns nothing.
        sweep = super()._once(header, calibration)
        return found._replace(seconds=found.seconds + sweep.seconds, work=found.work + sweep.work)

    def _once(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return learning_cost(header, calibration, bits=self.coarsest_bits, steps=self.steps, batch=self.batch)
