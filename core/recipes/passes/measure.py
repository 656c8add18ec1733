"""Passes that measure a model and do not change it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from nightpress.core.recipes.anatomy import anatomy_of
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions, Relation, Stage


class Profiling(PassOptions):
    """Count parameters, operations, bytes and the key/value cache of the source and of the pressed model, by layer and kind.

    For each pair of batch and length, gives attention's quadratic share and a roofline bound, for this machine or for a named device.
    """

    stage: ClassVar[Stage] = "measure"
    relation: ClassVar[Relation] = None
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors", "compressed-tensors", "onnx", "openvino"})

    pass_: Literal["profile"] = Field("profile", alias="pass")
    batch: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field((1,), min_length=1, max_length=8)
    length: tuple[Annotated[int, Field(ge=1, le=1_048_576)], ...] = Field(
        (128, 512, 2048), min_length=1, max_length=8, description="Tokens of each text."
    )
    device: Literal["this", "h100", "a100", "rtx-4090", "none"] = Field(
        "this", description="The machine of the roofline. `this` machine is measured in about a second."
    )

    @field_validator("batch", "length", mode="before")
    @classmethod
    def _one_or_many(cls, raw: object) -> object:
        return (raw,) if isinstance(raw, int) else raw

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(batch, length) for batch in self.batch for length in self.length]

    def describe(self) -> str:
        return f"operations and bytes at batch {list(self.batch)} × {list(self.length)} tokens"

    def check(self, header: ModelHeader) -> None:
        anatomy_of(header, self.name)

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return Cost(0, 2.0)
