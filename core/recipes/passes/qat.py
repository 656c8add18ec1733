"""Quantization-aware training: the model learns with rounded weights."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import Divisor
from nightpress.core.recipes.passes.base import ExportFormat, Need, Scope
from nightpress.core.recipes.passes.distill import Teaching
from nightpress.core.recipes.passes.quantizing import Quantizing
from nightpress.core.recipes.passes.training import Training
from nightpress.core.recipes.schemes import Activations, Scheme, Strategy

_CODES: frozenset[ExportFormat] = frozenset({"compressed-tensors"})
_FLOATS: frozenset[ExportFormat] = frozenset({"safetensors", "onnx", "openvino"})


class Qat(Teaching, Quantizing):
    """Train with weights, and with `activations: int8` also inputs, rounded as in the result (arXiv 1308.3432, 1712.05877).

    Gradients ignore the rounding (straight-through). The scales are computed from the weights at every step. The teacher is the model
    itself in float; with `logits.alpha` below 1 the model also learns from labels. `leaves: codes` writes compressed-tensors. `leaves:
    float` keeps float weights on the grid of `dynamic-int8`, so that `dynamic-int8` rounds them in ONNX and OpenVINO without loss.
    """

    needs: ClassVar[Need] = "training"
    scope: ClassVar[Scope] = "train"
    exports: ClassVar[frozenset[ExportFormat]] = _CODES | _FLOATS

    pass_: Literal["qat"] = Field("qat", alias="pass")
    train: Training = Training(learning_rate=2e-5)
    bits: Literal[4, 8] = 8
    group_size: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="Number of inputs that share a scale; null: one scale for each row. Default 64 at 4 bits.",
    )
    activations: Literal["none", "int8"] = Field(
        "none", description="`int8`: the inputs are also rounded, with one scale for each token."
    )
    leaves_as: Literal["codes", "float"] = Field(
        "codes", alias="leaves", description="What the next pass or export gets: the codes, or floats on their grid."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_group(cls, raw: Any) -> Any:
        small = isinstance(raw, dict) and raw.get("bits") == 4 and "group_size" not in raw
        return {**raw, "group_size": 64} if small else raw

    @model_validator(mode="after")
    def _known_to_runtimes(self) -> "Qat":
        if self.activations == "int8" and (self.bits, self.group_size) != (8, None):
            raise ValueError(
                "int8 activations are multiplied with int8 weights that have a scale a row: leave `bits` and `group_size`"
            )
        if self.leaves_as == "float" and (self.bits, self.group_size) != (8, None):
            raise ValueError(
                "`leaves: float` is for `dynamic-int8`, which has 8 bits and a scale a row: leave `bits` and `group_size`"
            )
        return self

    @property
    def last(self) -> bool:  # type: ignore[override]  # in other passes it does not depend on the options
        return self.leaves_as == "codes"

    @property
    def quantizes(self) -> bool:  # type: ignore[override]
        return self.leaves_as == "codes"

    def carriers(self, header: ModelHeader | None) -> frozenset[ExportFormat]:
        return _CODES if self.leaves_as == "codes" else _FLOATS

    def why_not(self, header: ModelHeader | None) -> str:
        return f"with `leaves: {self.leaves_as}` it leaves {'codes' if self.leaves_as == 'codes' else 'float weights'}"

    def scheme(self, module: str) -> Scheme:
        strategy: Strategy = "channel" if self.group_size is None else "group"
        activations = Activations() if self.activations == "int8" else None
        return Scheme(self.bits, strategy=strategy, group_size=self.group_size, activations=activations)

    @property
    def coarsest_bits(self) -> int:
        return self.bits

    @property
    def rounding_bits(self) -> int | None:
        return None

    def divisor(self) -> Divisor | None:
        return Divisor(self.group_size, "group_size") if self.group_size is not None else None

    def describe(self) -> str:
        return f"{self.scheme('').describe()}, {self.train.describe()}"

    def student_header(self, header: ModelHeader) -> ModelHeader:
        return header

    def check(self, header: ModelHeader) -> None:
        Quantizing.check(self, header)
        Teaching.check(self, header)

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        yield from Quantizing.warnings(self, header)
        yield from Teaching.warnings(self, header)

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return self.train.cost(header)
