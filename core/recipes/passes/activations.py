"""Passes that also round activations, or cached keys and values."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, blocks_cost, graph_cost, stream_cost
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import Divisor, invalid, is_expert, matches, module_of
from nightpress.core.recipes.passes.base import (
    GRAPHS,
    Calibrated,
    ExportFormat,
    Need,
    PassOptions,
    Patterns,
    Relation,
    Scope,
    Stage,
)
from nightpress.core.recipes.passes.quantizing import Quantizing
from nightpress.core.recipes.passes.within import Searching
from nightpress.core.recipes.schemes import BLOCK, Activations, Scheme


class SmoothQuant(Quantizing, Calibrated):
    """Int8 weights and int8 activations: large inputs are scaled down, and weights scaled up by the same factors (arXiv 2211.10438).

    Weights have one scale per row. Inputs have one scale per token, computed at run time, or one per layer from calibration. The layers
    before are divided by the factors; where they can't take factors, inputs are rounded without scaling, and the report says so. The result is
    compressed-tensors `int-quantized`. A mixture's experts are `pack-quantized` with float inputs, because transformers reads no other
    8-bit integer experts.
    """

    spreads: ClassVar[bool] = True
    pass_: Literal["smoothquant"] = Field("smoothquant", alias="pass")
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = Field(
        "search",
        description="How much of the inputs' differences in size moves into the weights: 0 none, 1 all. `search` tries several values and takes the one with the least error of the outputs.",
    )
    activations: Literal["token", "tensor"] = Field(
        "token",
        description="`token`: one scale for each token, computed at run time. `tensor`: one scale for each layer, from calibration.",
    )
    weights: Literal["nearest", "gptq"] = "nearest"
    damping: float = Field(
        0.01,
        gt=0,
        le=1,
        description="With `gptq`: added to the diagonal of the inputs' Gram matrix, as a share of its mean.",
    )

    def describe(self) -> str:
        strength = "searched" if self.alpha == "search" else f"{self.alpha:g}"
        return f"{self.scheme('').describe()}, alpha {strength}, weights by {self.weights}"

    def scheme(self, module: str) -> Scheme:
        return Scheme(8, activations=None if is_expert(module) else Activations(static=self.activations == "tensor"))

    @property
    def coarsest_bits(self) -> int:
        return 8

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return blocks_cost(header, calibration, gram=self.weights == "gptq", bits=8)

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        yield from super().warnings(header)
        if header is not None and any(is_expert(tensor.name) for tensor in header.tensors):
            yield "`smoothquant`: the inputs of a mixture's experts stay in float, because transformers reads no int8 experts with rounded ones."


class Fp8(Quantizing):
    """Fp8 (e4m3) weights and activations, for GPUs that multiply fp8. The result is compressed-tensors `float-quantized`.

    Dynamic activations need no data. Static activations have one scale per layer, from calibration.
    """

    spreads: ClassVar[bool] = True
    pass_: Literal["fp8"] = Field("fp8", alias="pass")
    weights: Literal["channel", "tensor", "block"] = Field(
        "channel", description="Which weights share a scale: a row, a layer, or a block of 128 × 128."
    )
    activations: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="`dynamic`: one scale for each token (with `block`: for each 128 of its inputs), computed at run time. `static`: one scale for each layer, from calibration.",
    )

    @model_validator(mode="after")
    def _blocks_are_dynamic(self) -> Self:
        if self.weights == "block" and self.activations == "static":
            raise ValueError(
                "`weights: block` needs `activations: dynamic`: its kernels scale 128 inputs of a token at a time"
            )
        return self

    @property
    def wants(self) -> Need:
        return "calibration" if self.activations == "static" else "nothing"

    def describe(self) -> str:
        return self.scheme("").describe()

    def divisor(self) -> Divisor | None:
        return Divisor(BLOCK, "block") if self.weights == "block" else None

    def scheme(self, module: str) -> Scheme:
        return Scheme(8, "float", self.weights, activations=Activations(static=self.activations == "static"))

    @property
    def coarsest_bits(self) -> int:
        return 8

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        if self.wants != "calibration":
            return stream_cost(header)
        return blocks_cost(header, calibration, gram=False, bits=8)


_GRAPH_BYTES = 1_900_000_000  #: largest fp32 weights of a graph that fits into one file

#: Ends of the names of weights that compute cached values; loaders look for the scales beside them.
CACHED_FROM = (".v_proj.weight", ".qkv_proj.weight")


class KvCache(PassOptions):
    """Scales for a key/value cache in 8 bits, from calibration: one for each layer's keys and one for its values.

    The weights are unchanged; a pass that quantizes them may follow. Keys are measured as a runtime caches them, after their rotation.
    """

    spreads: ClassVar[bool] = True
    needs: ClassVar[Need] = "calibration"
    scope: ClassVar[Scope] = "blocks"
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors"})
    quantizes: ClassVar[bool] = True
    relation: ClassVar[Relation] = "quantized"

    pass_: Literal["kv-cache"] = Field("kv-cache", alias="pass")
    format: Literal["fp8", "int8"] = "fp8"

    def describe(self) -> str:
        return f"{self.format} keys and values, a scale a layer for each"

    def scheme(self) -> Scheme:
        return Scheme(8, "float" if self.format == "fp8" else "int", activations=Activations(static=True))

    def cache_arguments(self) -> dict[str, Any]:
        """Return the `kv_cache_scheme` of a quantization_config."""
        arguments = self.scheme().activation_arguments()
        assert arguments is not None
        return arguments

    def check(self, header: ModelHeader) -> None:
        if not header.is_decoder:
            raise invalid("`kv-cache` takes decoders: no other model caches keys and values.", "Leave it out.")
        if not any(tensor.name.endswith(CACHED_FROM) for tensor in header.tensors):
            raise invalid(
                f"`kv-cache` can't take a {header.model_type}: no loader finds the scales in its attention.",
                "Leave it out.",
            )

        if "num_attention_heads" not in header.text_config:
            raise invalid(
                f"`kv-cache` can't take a {header.model_type}: transformers looks for `num_attention_heads` in its config.json, and there is none.",
                "Leave it out.",
            )

    def check_beside(self, passes: Sequence[PassOptions], header: ModelHeader | None) -> None:
        # With a quantization_config that quantizes no weights, transformers expects a scheme for the experts and finds none.
        if header is not None and header.has_experts and not any(options.last for options in passes):
            raise invalid(
                "`kv-cache` alone can't take a mixture of experts: transformers takes its experts for codes, and they stay in float.",
                "Let a pass that quantizes the weights follow, e.g. `gptq`.",
            )

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return blocks_cost(header, calibration)


class DynamicInt8(PassOptions):
    """Int8 weights, and activations rounded to int8 at run time, in ONNX Runtime or OpenVINO.

    The fastest form of an encoder on a CPU. Needs no data. Of an encoder-decoder, both graphs are rounded.
    """

    stage: ClassVar[Stage] = "runtime"
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu"})
    exports: ClassVar[frozenset[ExportFormat]] = GRAPHS
    last: ClassVar[bool] = True
    relation: ClassVar[Relation] = "quantized"

    pass_: Literal["dynamic-int8"] = Field("dynamic-int8", alias="pass")
    per_channel: bool = True
    ignore: Patterns = Field((), description="Graph nodes that stay in float: names, or `re:` patterns.")

    def describe(self) -> str:
        return "int8 weights and activations"

    def stored_bytes(self, tensor: TensorInfo) -> int:
        return _in_int8(tensor, self.ignore)

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return stream_cost(header)


class StaticInt8(Searching):
    """Int8 weights, and activations rounded to uint8 with one scale per layer from calibration, so that no ranges are computed at run time.

    The result is an ONNX graph with QuantizeLinear and DequantizeLinear (QDQ), which OpenVINO reads, too. Inputs are smoothed first, with
    the factors that cost their layers least, and weights compensate for each other's rounding. If the outputs with all layers in int8
    differ too much, the layers that cost most keep float arithmetic; their weights are still int8. `min_cosine` or `within` says what is
    too much. If no number of layers reaches `min_cosine`, half of them keep float arithmetic, and the report states it: gates decide. Attention scores are products of int8, too.
    The products with the values, and heads that read a single vector, stay in float.

    Takes encoders of texts and images, and encoder-decoders, whose two graphs are calibrated and searched together: the decoder reads what
    the model itself writes for the calibration data, and the data's own text.
    """

    stage: ClassVar[Stage] = "graph"
    needs: ClassVar[Need] = "calibration"
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu"})
    exports: ClassVar[frozenset[ExportFormat]] = GRAPHS
    last: ClassVar[bool] = True
    relation: ClassVar[Relation] = "quantized"

    pass_: Literal["static-int8"] = Field("static-int8", alias="pass")
    ranges: Literal["min-max", "percentile", "entropy", "mse"] = Field(
        "min-max", description="How the range of a layer's inputs is chosen from the values that calibration saw."
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="With `percentile`: the percentage of the values that the range covers."
    )
    min_cosine: float | None = Field(
        0.995,
        gt=0,
        lt=1,
        description="Layers stay in float until the answers to held-out texts have this cosine with the float graph's; null: no layer stays in float. If it can't be reached, the report says what was reached. With `within`: null.",
    )
    weight_bits: Literal["auto", 7, 8] = Field(
        "auto",
        description="7 where products of 8 bits could saturate: x86 without VNNI. `auto` looks at the processor that presses.",
    )
    ignore: Patterns = Field((), description="Graph nodes that stay in float: names, or `re:` patterns.")

    @model_validator(mode="before")
    @classmethod
    def _one_bound(cls, raw: object) -> object:
        if not isinstance(raw, dict) or raw.get("within") is None:
            return raw
        if raw.get("min_cosine") is not None:
            raise ValueError("`min_cosine` and `within` both say which layers stay in float: name one of them")
        return {**raw, "min_cosine": None}

    def describe(self) -> str:
        bound = "" if self.min_cosine is None else f", cosine at least {self.min_cosine:g}"
        if self.within is not None:
            bound = f", as many as keep {self.within}"
        return f"int8 weights and activations, ranges by {self.ranges}{bound}"

    def most_results(self, header: ModelHeader) -> int:
        return sum(len(tensor.shape) == 2 for tensor in header.tensors)

    def check(self, header: ModelHeader) -> None:
        if header.is_decoder:
            raise invalid(
                "`static-int8` takes encoders and encoder-decoders, and no language model alone.",
                "Use `dynamic-int8` or `smoothquant` for this model.",
            )
        if 4 * header.parameters > _GRAPH_BYTES:
            raise invalid(
                "`static-int8` takes graphs of up to 2 GiB in fp32, and this model's is larger.",
                "Use `dynamic-int8`, which takes graphs of any size.",
            )

    def stored_bytes(self, tensor: TensorInfo) -> int:
        return _in_int8(tensor, self.ignore)

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return graph_cost(header, calibration)


def _in_int8(tensor: TensorInfo, ignore: Patterns) -> int:
    """Return the bytes of a matrix in int8 with a float32 scale per row. `ignore` can be tested here: a graph uses the files' names."""
    if len(tensor.shape) != 2 or matches(tensor.name, ignore) or matches(module_of(tensor), ignore):
        return tensor.size
    return tensor.shape[0] * tensor.shape[1] + 4 * tensor.shape[0]
