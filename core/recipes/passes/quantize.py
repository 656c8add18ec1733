"""Passes that round weights, and activations, to a grid."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.recipes.calibration import Calibration
from core.recipes.costs import Cost, blocks_cost, stream_cost
from core.recipes.header import ModelHeader, TensorInfo
from core.recipes.linears import Divisor, check_layout, invalid, is_token_embedding, matches, module_of
from core.recipes.passes.base import (
    FOLDABLE,
    Calibrated,
    ExportFormat,
    Need,
    OnLinears,
    PassOptions,
    Patterns,
    Scope,
)
from core.recipes.passes.sparsity import Pattern, pattern_divisor, with_sparsity
from core.recipes.schemes import BLOCK, Activations, Scheme, Strategy

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
Ranges = Literal["extremes", "least-error", "half-quadratic"]
_RANGES = "A scale from its weights' extremes, where their rounding costs least, or by half-quadratic splitting, which minds outliers less."
_ONE_GRID = "transformers takes the zero points of one grid alone: leave `symmetric` at true with {}"


class Quantizing(OnLinears):
    """A pass that leaves codes and scales in the place of linear weights, in a format of compressed-tensors."""

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors"})
    last: ClassVar[bool] = True
    quantizes: ClassVar[bool] = True

    def scheme(self, module: str) -> Scheme:
        """How the weight of this module is stored."""
        raise NotImplementedError

    @property
    def coarsest_bits(self) -> int:
        """Of any weight it rounds."""
        raise NotImplementedError

    def stored_bytes(self, tensor: TensorInfo) -> int:
        return self.scheme(module_of(tensor)).stored_bytes(tensor) if self.takes(tensor) else tensor.size


class Override(BaseModel):
    """What is different for some layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits
    group_size: int | None = Field(
        None, ge=16, le=1024, description="Inputs that share a scale; null: one scale a row."
    )


class Rounding(Quantizing):
    """A pass that leaves integer codes and scales in the place of linear weights, as compressed-tensors `pack-quantized`."""

    bits: int
    group_size: int | None = Field(128, ge=16, le=1024, description="Inputs that share a scale; null: one scale a row.")
    symmetric: bool = True
    ranges: Ranges = Field("least-error", description=_RANGES)
    overrides: dict[str, Override] = Field(
        default_factory=dict,
        max_length=100,
        description='Other bits for layers by name: names, or `re:` patterns, e.g. `{"re:.*down_proj": {bits: 8}}`. The first that fits counts.',
    )
    embeddings: bool = Field(
        False,
        description="Round the token embeddings too, on the same grid. transformers loads them, tied to the output head or not; vLLM doesn't.",
    )

    @model_validator(mode="after")
    def _one_grid(self) -> Self:
        if self.overrides and (not self.symmetric or self.embeddings):
            raise ValueError(_ONE_GRID.format("`overrides`") + ", and `embeddings` at false")
        return self

    def describe(self) -> str:
        return self._plain.describe() + (f", {len(self.overrides)} overrides" if self.overrides else "")

    @property
    def _plain(self) -> Scheme:
        strategy: Strategy = "channel" if self.group_size is None else "group"
        return Scheme(self.bits, strategy=strategy, group_size=self.group_size, symmetric=self.symmetric)

    def scheme(self, module: str) -> Scheme:
        for pattern, other in self.overrides.items():
            if matches(module, (pattern,)):
                strategy: Strategy = "channel" if other.group_size is None else "group"
                return Scheme(other.bits, strategy=strategy, group_size=other.group_size)
        return self._plain

    @property
    def coarsest_bits(self) -> int:
        return min([self.bits, *(one.bits for one in self.overrides.values())])

    def takes(self, tensor: TensorInfo) -> bool:
        return super().takes(tensor) or self.takes_table(tensor)

    def takes_table(self, tensor: TensorInfo) -> bool:
        """Whether it is the table of token embeddings, and is to be rounded."""
        return self.embeddings and is_token_embedding(tensor)

    def check(self, header: ModelHeader) -> None:
        super().check(header)
        by_group: dict[int, list[TensorInfo]] = {}
        for tensor in header.tensors:
            if self.takes(tensor) and (size := self.scheme(module_of(tensor)).group_size) is not None:
                by_group.setdefault(size, []).append(tensor)
        for size, weights in by_group.items():
            check_layout(self.name, weights, header, Divisor(size, "group_size"), turns=self.turns)
        names = [module_of(tensor) for tensor in header.tensors if self.takes(tensor)]
        for pattern in self.overrides:
            if not any(matches(name, (pattern,)) for name in names):
                raise invalid(f"`{self.name}`: `overrides` names {pattern}, which is no layer to round.", "Correct it.")

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        yield from super().warnings(header)
        if self.embeddings:
            yield "Rounded token embeddings are loaded by transformers, not by vLLM."


class WeightOnly(Rounding):
    """Round linear weights to the nearest step of a grid; activations stay in float.

    Integers of 2 to 8 bits (`pack-quantized`): a scale a row, at fewer than 8 bits a scale a group of `group_size` inputs. Floats: `fp8`
    (e4m3, a scale a row), `mxfp4` (e2m1, a power of two for each 32 inputs), `nvfp4` (e2m1, an fp8 scale for each 16).
    """

    pass_: Literal["weight-only"] = Field("weight-only", alias="pass")
    format: Literal["int", "fp8", "mxfp4", "nvfp4"] = "int"
    bits: Bits = 8
    group_size: int | None = Field(
        None, ge=16, le=1024, description="Inputs that share a scale; null: one scale a row. Default 128 below 8 bits."
    )
    ranges: Ranges = Field("extremes", description=_RANGES)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: object) -> object:
        if not isinstance(raw, dict):
            return raw
        kind = raw.get("format", "int")
        if kind == "nf4":
            raise ValueError(
                "nf4 is a layout of bitsandbytes, which compressed-tensors doesn't carry; use `nvfp4`, `mxfp4`, or int4 with half-quadratic ranges"
            )
        if kind == "int":
            small = raw.get("bits", 8) != 8 and "group_size" not in raw
            return {**raw, "group_size": 128} if small else raw
        fixed = _FLOATS.get(str(kind), {})
        for key, value in fixed.items():
            if raw.get(key, value) != value:
                raise ValueError(f"`format: {kind}` has {key} {value}; leave it out")
        return {**raw, **fixed}

    @model_validator(mode="after")
    def _floats_have_no_zero(self) -> Self:
        if self.format != "int" and (not self.symmetric or self.overrides or self.embeddings):
            raise ValueError(f"`format: {self.format}` takes neither zero points, `overrides` nor `embeddings`")
        if self.format != "int" and self.ranges == "half-quadratic":
            raise ValueError("half-quadratic ranges are for integers")
        return self

    @property
    def _plain(self) -> Scheme:
        if self.format == "int":
            return super()._plain
        strategy: Strategy = "channel" if self.group_size is None else "group"
        return Scheme(self.bits, "float", strategy, self.group_size)


_FLOATS: dict[str, dict[str, int | None]] = {
    "fp8": {"bits": 8, "group_size": None},
    "mxfp4": {"bits": 4, "group_size": 32},
    "nvfp4": {"bits": 4, "group_size": 16},
}


class Budgeted(Rounding, Calibrated):
    """A pass that can give each layer its own bits, by what each would lose."""

    budget: float | None = Field(
        None,
        gt=2,
        le=8.5,
        description="Bits a weight, scales included, over all layers to round. Each layer's error is measured for every candidate, and the bits go where they help most.",
    )
    candidates: tuple[Bits, ...] = Field((4, 8), min_length=2, max_length=7, description="Bits to choose from.")

    @model_validator(mode="after")
    def _budget_alone(self) -> Self:
        if self.budget is not None and (self.overrides or not self.symmetric or self.embeddings):
            raise ValueError(_ONE_GRID.format("`budget`") + ", `embeddings` at false, and name no `overrides`")
        return self

    def describe(self) -> str:
        if self.budget is None:
            return super().describe()
        return f"{self.budget:g} bits a weight from int{', int'.join(map(str, self.candidates))} by measured error"

    def candidate(self, bits: int) -> Scheme:
        return replace(self._plain, bits=bits)

    def check(self, header: ModelHeader) -> None:
        super().check(header)
        if self.budget is None:
            return
        weights = [tensor for tensor in header.tensors if self.takes(tensor)]
        count = sum(tensor.shape[0] * tensor.shape[1] for tensor in weights)
        least = 8 * sum(self.candidate(min(self.candidates)).stored_bytes(one) for one in weights) / count
        if least > self.budget:
            raise invalid(
                f"`{self.name}`: a budget of {self.budget:g} bits a weight is less than int{min(self.candidates)} takes everywhere, {least:.2f} with its scales.",
                "Raise `budget`, or name fewer bits in `candidates`.",
            )

    def stored_bytes(self, tensor: TensorInfo) -> int:
        if self.budget is None or not self.takes(tensor):
            return super().stored_bytes(tensor)
        most = self.candidate(max(self.candidates)).stored_bytes(tensor)
        return min(most, int(self.budget * tensor.shape[0] * tensor.shape[1] / 8))

    @property
    def coarsest_bits(self) -> int:
        return super().coarsest_bits if self.budget is None else min(self.candidates)

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        once = super().cost(header, calibration)
        return once if self.budget is None else Cost(once.memory_bytes, 2 * once.seconds)


class Gptq(Budgeted):
    """Round linear weights one input after another, the inputs still to come making up for what each loses (arXiv 2210.17323).

    With `sparsity` or a `pattern`, weights are pruned on the way by the same rule (SparseGPT). With a `budget`, each layer gets the bits
    that its measured error calls for. Written as `pack-quantized`.
    """

    pass_: Literal["gptq"] = Field("gptq", alias="pass")
    bits: Bits = 4
    order: Literal["activation", "natural"] = Field(
        "activation",
        description="`activation`: the inputs with the most power first. The result loads and runs just the same.",
    )
    damping: float = Field(0.01, gt=0, le=1, description="Of the mean power of the inputs, added to each one's.")
    refine: bool = Field(True, description="Fit the scales once more to the codes that were settled.")
    sparsity: float | None = Field(None, gt=0, lt=1, description="Share of weights set to zero as well.")
    pattern: Pattern = "unstructured"

    @model_validator(mode="before")
    @classmethod
    def _pattern_gives_sparsity(cls, raw: object) -> object:
        return with_sparsity(raw)

    @model_validator(mode="after")
    def _pattern_in_order(self) -> Self:
        if self.pattern != "unstructured" and self.order == "activation":
            raise ValueError("a pattern N:M needs `order: natural`")
        return self

    def describe(self) -> str:
        return super().describe() + (f", {self.sparsity:.0%} zeros" if self.sparsity is not None else "")

    def divisor(self) -> Divisor | None:
        return pattern_divisor(self.pattern)


class Awq(Budgeted):
    """Scale columns up where their inputs are strong, before rounding to nearest; the norms before them make up for it (arXiv 2306.00978).

    Takes decoders whose norms and linear layers can exchange factors. Written as `pack-quantized`.
    """

    model_types: ClassVar[frozenset[str]] = FOLDABLE

    pass_: Literal["awq"] = Field("awq", alias="pass")
    bits: Bits = 4
    symmetric: bool = False

    def check(self, header: ModelHeader) -> None:
        super().check(header)
        if header.model_type not in self.model_types:
            raise invalid(
                f"`awq` can't take a {header.model_type}: its norms can't make up for scaled inputs.",
                f"Use `gptq`; `awq` takes {', '.join(sorted(self.model_types))}.",
            )


class SmoothQuant(Quantizing, Calibrated):
    """Int8 weights and int8 activations: strong inputs are scaled down, the norms before them making up for it (arXiv 2211.10438).

    Weights have a scale a row. Inputs are rounded with a scale a token as they come, or with one a layer from calibration. Where a
    family's norms can't take the factors, its inputs are rounded as they are. Written as compressed-tensors `int-quantized`.
    """

    pass_: Literal["smoothquant"] = Field("smoothquant", alias="pass")
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = Field(
        "search",
        description="How much of an input's strength moves into the weights: 0 nothing, 1 all; `search` tries, and takes what costs the outputs least.",
    )
    activations: Literal["token", "tensor"] = Field(
        "token", description="`token`: a scale a token, found as it comes. `tensor`: one a layer, from calibration."
    )
    weights: Literal["nearest", "gptq"] = "nearest"
    damping: float = Field(
        0.01, gt=0, le=1, description="With `gptq`: of the mean power of the inputs, added to each one's."
    )

    def describe(self) -> str:
        strength = "searched" if self.alpha == "search" else f"{self.alpha:g}"
        return f"{self.scheme('').describe()}, alpha {strength}, weights by {self.weights}"

    def scheme(self, module: str) -> Scheme:
        return Scheme(8, activations=Activations(static=self.activations == "tensor"))

    @property
    def coarsest_bits(self) -> int:
        return 8

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        yield from super().warnings(header)
        if header is not None and header.model_type not in FOLDABLE:
            yield f"`smoothquant`: the norms of a {header.model_type} can't take factors, so its inputs are rounded as they are."


class Fp8(Quantizing):
    """Fp8 (e4m3) weights and activations, for GPUs that multiply them. Written as compressed-tensors `float-quantized`.

    With dynamic activations it needs no data; static ones take one scale a layer from calibration.
    """

    pass_: Literal["fp8"] = Field("fp8", alias="pass")
    weights: Literal["channel", "tensor", "block"] = Field(
        "channel", description="Which weights share a scale: a row, all of a layer, or 128 × 128."
    )
    activations: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="`dynamic`: a scale a token (with `block`, for each 128 of its inputs), as it comes. `static`: one a layer.",
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
        return blocks_cost(header, calibration) if self.wants == "calibration" else stream_cost(header)


#: Weights of what is cached; loaders look for scales beside them.
CACHED_FROM = (".v_proj.weight", ".qkv_proj.weight")


class KvCache(PassOptions):
    """Scales with which a runtime keeps keys and values in 8 bits, one for each layer's keys and one for its values, from calibration.

    The weights stay as they are; a pass that quantizes them may follow. Keys are seen as they are cached, after their rotation.
    """

    needs: ClassVar[Need] = "calibration"
    scope: ClassVar[Scope] = "blocks"
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors"})
    quantizes: ClassVar[bool] = True

    pass_: Literal["kv-cache"] = Field("kv-cache", alias="pass")
    format: Literal["fp8", "int8"] = "fp8"

    def describe(self) -> str:
        return f"{self.format} keys and values, a scale a layer for each"

    def scheme(self) -> Scheme:
        return Scheme(8, "float" if self.format == "fp8" else "int", activations=Activations(static=True))

    def cache_arguments(self) -> dict[str, Any]:
        """`kv_cache_scheme` of a quantization_config."""
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

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return blocks_cost(header, calibration)


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
