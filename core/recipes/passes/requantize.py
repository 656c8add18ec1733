"""The pass that opens a source which is quantized already."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, stream_cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions, Relation, Stage

Method = Literal[
    "any", "auto-round", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4"
]


class Requantize(PassOptions):
    """Start from a model that is quantized already: its codes are decoded, a tensor at a time, and the other passes read the floats.

    Everything is compared with what was brought: its size, and the figures of the floats that its codes stand for.
    """

    stage: ClassVar[Stage] = "source"
    relation: ClassVar[Relation] = None
    exports: ClassVar[frozenset[ExportFormat]] = frozenset(
        {"safetensors", "compressed-tensors", "onnx", "openvino", "gguf", "mlx", "transformers.js"}
    )

    pass_: Literal["requantize"] = Field("requantize", alias="pass")
    starts_from: Method = Field(
        "any", alias="from", description="The `quant_method` in the source's config; another is refused."
    )

    def describe(self) -> str:
        return f"decode the source's codes ({'whatever they are' if self.starts_from == 'any' else self.starts_from})"

    def check(self, header: ModelHeader) -> None:
        if self.starts_from == "any":
            return
        found = header.brought.method if header.brought is not None and header.brought.weights else "floats"
        if found != self.starts_from:
            raise invalid(
                f"`requantize` is to start from {self.starts_from}, and the model is {found}.",
                f"Set `from: {found}`, or leave `from` out." if found != "floats" else "Leave `requantize` out.",
            )

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        if header is None:
            return
        if header.brought is None or not header.brought.weights:
            yield "`requantize` does nothing: the model's weights are floats."
        else:
            yield (
                f"The source is quantized already ({header.brought.detail}; {header.brought.weights} weights). All figures compare with it, "
                "not with the float model that it was made from. Its runtime may round the inputs of layers, too, which is not repeated here."
            )

    def leaves(self, header: ModelHeader) -> ModelHeader:
        return header.model_copy(update={"brought": None})

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        del calibration
        return stream_cost(header)
