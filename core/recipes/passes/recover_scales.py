"""The options of `recover-scales`."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions, Relation
from nightpress.core.recipes.passes.distill import Teaching
from nightpress.core.recipes.passes.lessons import Logits
from nightpress.core.recipes.passes.quantize import Rounding
from nightpress.core.recipes.passes.training import Training

#: Other than those of `Training`: a relative change of scales takes a larger rate, and is not drawn back to zero.
_TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "batch": 8, "length": 512, "weight_decay": 0.0}
_EPOCHS = 4
_TRAINED = 0.02  #: share of the parameters that learn: scales, norms and biases


class RecoverScales(Teaching):
    """Train the scales, norms and biases of a rounded model, with the job's source model as its teacher. Its codes stay as they are.

    It follows `weight-only`, `gptq`, `awq` or `learned-rounding`. The result has the same format, size and speed. Powers of two (the
    scales of `mxfp4`) and integer zero points stay as they are, too. With a `rank`, a low-rank change of each layer is trained after that,
    and written beside the model as a LoRA adapter of PEFT, in the folder `adapter`: fixed codes can't absorb it. By default the source's
    logits are learned at temperature 1, and are computed once and kept.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors", "onnx", "openvino", "gguf", "mlx"})
    last: ClassVar[bool] = True
    reads_codes: ClassVar[bool] = True
    quantizes: ClassVar[bool] = True
    relation: ClassVar[Relation] = "quantized"

    pass_: Literal["recover-scales"] = Field("recover-scales", alias="pass")
    train: Training = Training(epochs=_EPOCHS, **_TRAINING)
    rank: int | None = Field(
        None, ge=1, le=1024, description="Also train a LoRA adapter of this rank, which is written beside the model."
    )
    alpha: float = Field(32.0, gt=0, le=1e6, description="With a `rank`: the change is scaled by alpha / rank.")

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, raw: object) -> object:
        if not isinstance(raw, dict) or not isinstance(raw.get("train"), dict):
            return raw
        train = {**_TRAINING, **raw["train"]}
        return {**raw, "train": train if {"epochs", "steps"} & train.keys() else {**train, "epochs": _EPOCHS}}

    def describe(self) -> str:
        return self.train.describe() + (f", then a LoRA of rank {self.rank}" if self.rank else "")

    def resolved(self, header: ModelHeader) -> Teaching:
        if any((self.logits, self.hidden, self.relations, self.cosine)) or header.task == "embedding":
            return super().resolved(header)
        return self.model_copy(update={"logits": Logits(temperature=1.0, cache=True)})

    def student_header(self, header: ModelHeader) -> ModelHeader:
        return header

    def carriers(self, header: ModelHeader | None) -> frozenset[ExportFormat]:
        return self.exports if self.rank is None else frozenset({"compressed-tensors"})

    def why_not(self, header: ModelHeader | None) -> str:
        return "" if self.rank is None else "a LoRA adapter is for transformers and vLLM"

    def check_beside(self, passes: Sequence[PassOptions], header: ModelHeader | None) -> None:
        at = next(index for index, options in enumerate(passes) if options is self)
        if at == 0 or not isinstance(passes[at - 1], Rounding):
            raise invalid(
                f"`{self.name}` trains the scales of a rounded model, and no rounding pass stands before it.",
                "Put it right behind `weight-only`, `gptq`, `awq` or `learned-rounding`.",
            )

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        yield from super().warnings(header)
        if not self.train.validation:
            yield f"`{self.name}`: without a share for `validation` it can't tell how much it recovered, nor keep the better model."

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        found = self.train.cost(header, trained=_TRAINED)
        # The teacher, and for each step the dequantized weights and their codes as floats.
        more = 12 * header.parameters
        found = found._replace(memory_bytes=found.memory_bytes + more, gpu_bytes=found.gpu_bytes + more)
        return found if self.rank is None else found.times(2)
