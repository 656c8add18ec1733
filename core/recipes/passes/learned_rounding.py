"""The options of `learned-rounding`."""

from typing import Literal

from pydantic import Field

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, learning_cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes.gptq import Formatted


class LearnedRounding(Formatted):
    """Learn which way each linear weight is rounded, and the range of each scale, against each block's output (arXiv 2309.05516).

    Each block learns by signed gradient descent, from the nearest codes or GPTQ's. It takes much longer than `gptq` and
    loses less, most of all at 2 and 3 bits. The result is `pack-quantized`, or floats of 4 bits: `mxfp4` (a power of two for each 32
    inputs) and `nvfp4` (an fp8 scale for each 16 inputs).
    """

    pass_: Literal["learned-rounding"] = Field("learned-rounding", alias="pass")
    start: Literal["nearest", "better"] = Field(
        "nearest",
        description="The codes to start from: the nearest ones, or the better of these and GPTQ's at the block's output. GPTQ's fit the calibration text, and may do worse on other text.",
    )
    steps: int = Field(200, ge=10, le=10_000, description="Learning steps of each block.")
    batch: int = Field(8, ge=1, le=1024, description="Calibration samples of a step.")

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
