"""Passes that round weights, and activations, to a grid."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from core.recipes.calibration import Calibration
from core.recipes.costs import Cost, stream_cost
from core.recipes.header import ModelHeader, TensorInfo
from core.recipes.linears import Divisor, invalid
from core.recipes.passes.base import Calibrated, ExportFormat, OnLinears, PassOptions, Patterns, Scope, packed_bytes
from core.recipes.passes.sparsity import Pattern, pattern_divisor, with_sparsity


class Rounding(OnLinears):
    """A pass that leaves integer codes and scales in the place of linear weights, as compressed-tensors `pack-quantized`."""

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors"})
    last: ClassVar[bool] = True
    quantizes: ClassVar[bool] = True

    bits: int
    group_size: int | None = Field(128, ge=16, le=1024, description="Inputs that share a scale; null: one scale a row.")
    symmetric: bool = True

    def describe(self) -> str:
        return f"int{self.bits}, " + (f"groups of {self.group_size}" if self.group_size else "a scale a row")

    def divisor(self) -> Divisor | None:
        return Divisor(self.group_size, "group_size") if self.group_size is not None else None

    def stored_bytes(self, tensor: TensorInfo) -> int:
        if not self.takes(tensor):
            return tensor.size
        return packed_bytes(tensor, self.bits, self.group_size, symmetric=self.symmetric)


class WeightOnly(Rounding):
    """Round linear weights to the nearest step of an integer grid; activations stay in float.

    int8: a scale a channel. int4: a scale a group of `group_size` inputs. Written as compressed-tensors `pack-quantized`.
    """

    pass_: Literal["weight-only"] = Field("weight-only", alias="pass")
    bits: Literal[4, 8] = 8
    group_size: int | None = Field(
        None, ge=16, le=1024, description="Inputs that share a scale; null: one scale a row. Default 128 at 4 bits."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_group(cls, raw: object) -> object:
        if isinstance(raw, dict) and raw.get("bits") == 4 and "group_size" not in raw:
            return {**raw, "group_size": 128}
        return raw


class Gptq(Rounding, Calibrated):
    """Round linear weights one input after another, the inputs still to come making up for what each loses (arXiv 2210.17323).

    With `sparsity` or a `pattern`, weights are pruned on the way by the same rule (SparseGPT). Written as `pack-quantized`.
    """

    pass_: Literal["gptq"] = Field("gptq", alias="pass")
    bits: Literal[2, 3, 4, 8] = 4
    order: Literal["activation", "natural"] = Field(
        "activation",
        description="`activation`: the inputs with the most power first. The result loads and runs just the same.",
    )
    ranges: Literal["extremes", "least-error"] = Field(
        "least-error", description="A scale from its weights' extremes, or where their rounding costs the output least."
    )
    damping: float = Field(0.01, gt=0, le=1, description="Of the mean power of the inputs, added to each one's.")
    sparsity: float | None = Field(None, gt=0, lt=1, description="Share of weights set to zero as well.")
    pattern: Pattern = "unstructured"

    @model_validator(mode="before")
    @classmethod
    def _pattern_gives_sparsity(cls, raw: object) -> object:
        return with_sparsity(raw)

    @model_validator(mode="after")
    def _pattern_in_order(self) -> "Gptq":
        if self.pattern != "unstructured" and self.order == "activation":
            raise ValueError("a pattern N:M needs `order: natural`")
        return self

    def describe(self) -> str:
        return super().describe() + (f", {self.sparsity:.0%} zeros" if self.sparsity is not None else "")

    def divisor(self) -> Divisor | None:
        return super().divisor() or pattern_divisor(self.pattern)


class Awq(Rounding, Calibrated):
    """Scale columns up where their inputs are strong, before rounding to nearest; the norms before them make up for it (arXiv 2306.00978).

    Takes decoders whose norms and linear layers can exchange factors. Written as `pack-quantized`.
    """

    model_types: ClassVar[frozenset[str]] = frozenset(
        {
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi",
            "phi3",
            "gpt_neox",
            "opt",
            "starcoder2",
        }
    )

    pass_: Literal["awq"] = Field("awq", alias="pass")
    bits: Literal[2, 3, 4, 8] = 4
    symmetric: bool = False
    ranges: Literal["extremes", "least-error"] = Field(
        "least-error", description="A scale from its weights' extremes, or where their rounding costs the output least."
    )

    def check(self, header: ModelHeader) -> None:
        super().check(header)
        if header.model_type not in self.model_types:
            raise invalid(
                f"`awq` can't take a {header.model_type}: its norms can't make up for scaled inputs.",
                f"Use `gptq`; `awq` takes {', '.join(sorted(self.model_types))}.",
            )


class DynamicInt8(PassOptions):
    """Int8 weights, and activations rounded to int8 as they come, in ONNX Runtime or OpenVINO.

    The fastest form of an encoder on a CPU. Needs no data.
    """

    scope: ClassVar[Scope] = "graph"
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu"})
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"onnx", "openvino"})
    last: ClassVar[bool] = True

    pass_: Literal["dynamic-int8"] = Field("dynamic-int8", alias="pass")
    per_channel: bool = True
    ignore: Patterns = Field((), description="Graph nodes left in float: names, or `re:` patterns.")

    def describe(self) -> str:
        return "int8 weights and activations"

    def check(self, header: ModelHeader) -> None:
        if header.is_decoder:
            raise invalid(
                "`dynamic-int8` takes encoders; a decoder exported so would run without its key/value cache.",
                "Use `weight-only` for this model.",
            )

    def stored_bytes(self, tensor: TensorInfo) -> int:
        return tensor.size if len(tensor.shape) != 2 else tensor.shape[0] * tensor.shape[1] + 4 * tensor.shape[0]

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return stream_cost(header)
