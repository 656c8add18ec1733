"""Passes that round weights to a grid."""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, blocks_cost
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import Divisor, check_layout, invalid, is_token_embedding, matches, module_of
from nightpress.core.recipes.mlx import why_no_mlx_grid
from nightpress.core.recipes.passes.base import (
    GRAPHS,
    Calibrated,
    ExportFormat,
)
from nightpress.core.recipes.passes.quantizing import Quantizing
from nightpress.core.recipes.passes.within import Searching
from nightpress.core.recipes.schemes import BLOCK, Activations, Scheme, Strategy

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
RoundedInputs = Literal["none", "fp8", "fp4"]
Ranges = Literal["extremes", "least-error", "half-quadratic"]
_RANGES = "How a scale is chosen: from its weights' extremes, for the least rounding error, or by half-quadratic splitting, which gives outliers less weight."
INPUTS = "How a runtime rounds what enters a layer, with fp4 weights alone: to `fp4` in groups as the weights are, or to `fp8` with a scale for each 128 inputs (`mxfp4` only). none: inputs stay in float."
_EXPERTS_IN_GRAPHS = "in a graph a mixture's experts have other layers than in the files, so that their codes fit no product (`dynamic-int8` rounds them)"
_ONE_GRID = "transformers takes the zero points of one grid alone: leave `symmetric` at true with {}"


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(MB|GB|%)")
_UNITS = {"MB": 1e6, "GB": 1e9}


def _checked(budget: float | str | None) -> float | str | None:
    known = _SIZE.fullmatch(budget) if isinstance(budget, str) else budget is None or 2 < budget <= 8.5
    if not known:
        raise ValueError(
            f"{budget!r} is neither bits a weight, more than 2 and at most 8.5, nor a size like '100MB' or '35%'"
        )
    return budget


class Override(BaseModel):
    """Bits and group size for some layers."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    bits: Bits
    group_size: int | None = Field(
        None, ge=16, le=1024, description="Number of inputs that share a scale; null: one scale for each row."
    )

    @property
    def scheme(self) -> Scheme:
        strategy: Strategy = "channel" if self.group_size is None else "group"
        return Scheme(self.bits, strategy=strategy, group_size=self.group_size)


class Rounding(Quantizing):
    """A pass that replaces linear weights with integer codes and scales, in the format `pack-quantized` of compressed-tensors.

    Graphs and GGUF contain the same codes in other layouts.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors", "onnx", "openvino", "gguf", "mlx"})

    bits: int
    group_size: int | None = Field(
        128, ge=16, le=1024, description="Number of inputs that share a scale; null: one scale for each row."
    )
    symmetric: bool = True
    ranges: Ranges = Field("least-error", description=_RANGES)
    overrides: dict[str, Override] = Field(
        default_factory=dict,
        max_length=100,
        description='Other bits for some layers, by name or `re:` pattern, e.g. `{"re:.*down_proj": {bits: 8}}`. The first entry that fits a layer counts.',
    )
    embeddings: bool = Field(
        False,
        description="Also round the token embeddings, on the same grid. transformers loads such embeddings, whether or not they are tied to the output head; vLLM refuses them (tried with 0.32).",
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
                return other.scheme
        return self._plain

    def carriers(self, header: ModelHeader | None) -> frozenset[ExportFormat]:
        if self._plain.kind != "int":
            return frozenset({"compressed-tensors"})
        left = self.exports if self._why_not_mlx() is None else self.exports - {"mlx"}
        return left - GRAPHS if header is not None and header.has_experts else left

    def why_not(self, header: ModelHeader | None) -> str:
        if self._plain.kind != "int":
            return ""
        experts = _EXPERTS_IN_GRAPHS if header is not None and header.has_experts else None
        return "; ".join(filter(None, (self._why_not_mlx(), experts)))

    def _why_not_mlx(self) -> str | None:
        return next(filter(None, map(why_no_mlx_grid, self._possible())), None)

    def _possible(self) -> list[Scheme]:
        """Return all schemes that a layer may get."""
        return [self._plain, *(other.scheme for other in self.overrides.values())]

    @property
    def coarsest_bits(self) -> int:
        return min([self.bits, *(override.bits for override in self.overrides.values())])

    def takes(self, tensor: TensorInfo) -> bool:
        return super().takes(tensor) or self.takes_table(tensor)

    def takes_table(self, tensor: TensorInfo) -> bool:
        """Return whether the tensor is the table of token embeddings, and `embeddings` is set."""
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
            yield "Rounded token embeddings are loaded by transformers; vLLM (tried with 0.32) refuses them."


class WeightOnly(Rounding):
    """Round linear weights to the nearest step of a grid; activations stay in float.

    Integers of 2 to 8 bits (`pack-quantized`) by default have one scale per row at 8 bits, and one per 128 inputs at fewer bits. Floats are
    `fp8` (e4m3, one scale per row), `mxfp4` (e2m1, a power of two for each 32 inputs) and `nvfp4` (e2m1, an fp8 scale for each 16 inputs).
    """

    pass_: Literal["weight-only"] = Field("weight-only", alias="pass")
    format: Literal["int", "fp8", "mxfp4", "nvfp4"] = "int"
    bits: Bits = 8
    group_size: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="Number of inputs that share a scale; null: one scale for each row. Default 128 below 8 bits.",
    )
    ranges: Ranges = Field("extremes", description=_RANGES)
    activations: RoundedInputs = Field("none", description=INPUTS)

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
        return with_float_format(raw)

    @model_validator(mode="after")
    def _floats_have_no_zero(self) -> Self:
        if self.format != "int" and (not self.symmetric or self.overrides or self.embeddings):
            raise ValueError(f"`format: {self.format}` takes neither zero points, `overrides` nor `embeddings`")
        if self.format != "int" and self.ranges == "half-quadratic":
            raise ValueError("half-quadratic ranges are for integers")
        check_inputs(self.format, self.activations)
        if self.activations != "none" and self.format == "nvfp4":
            raise ValueError(
                "nvfp4 inputs need a scale from calibration, and `weight-only` has none; use `gptq` or `learned-rounding`"
            )
        return self

    @property
    def _plain(self) -> Scheme:
        if self.format == "int":
            return super()._plain
        strategy: Strategy = "channel" if self.group_size is None else "group"
        return Scheme(self.bits, "float", strategy, self.group_size, activations=rounded_inputs(self.activations))

    def divisor(self) -> Divisor | None:
        return inputs_divisor(self.activations)


_FLOATS: dict[str, dict[str, int | None]] = {
    "fp8": {"bits": 8, "group_size": None},
    "mxfp4": {"bits": 4, "group_size": 32},
    "nvfp4": {"bits": 4, "group_size": 16},
}


def with_float_format(raw: object) -> object:
    """Return a pass's raw options with the bits and the group size that its `format` of floats fixes. Raises ValueError for others."""
    if not isinstance(raw, dict):
        return raw
    kind = raw.get("format", "int")
    fixed = _FLOATS.get(str(kind), {})
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise ValueError(f"`format: {kind}` has {key} {value}; leave it out")
    return {**raw, **fixed}


def check_inputs(form: str, inputs: RoundedInputs) -> None:
    """Raise ValueError if no runtime rounds a layer's inputs so where its weights have this format."""
    if inputs != "none" and form not in {"mxfp4", "nvfp4"}:
        raise ValueError(f"`activations: {inputs}` goes with fp4 weights: set `format` to `mxfp4` or `nvfp4`")
    if inputs == "fp8" and form == "nvfp4":
        raise ValueError(
            "compressed-tensors has no scheme with nvfp4 weights and fp8 inputs; use `mxfp4`, or `fp4` inputs"
        )


def rounded_inputs(inputs: RoundedInputs) -> Activations | None:
    """Return how a runtime rounds the inputs of fp4 weights."""
    return None if inputs == "none" else Activations(bits=4 if inputs == "fp4" else 8)


def inputs_divisor(inputs: RoundedInputs) -> Divisor | None:
    """Return the number that must divide the inputs, so that each scale belongs to as many of them."""
    return Divisor(BLOCK, "activations: fp8") if inputs == "fp8" else None


def _bytes_of(size: str, whole: int) -> float:
    """Return the bytes of a size like `100MB`, or like `35%` of `whole`."""
    match = _SIZE.fullmatch(size)
    assert match is not None
    number, unit = match.groups()
    return float(number) / 100 * whole if unit == "%" else float(number) * _UNITS[unit]


class Budgeted(Searching, Rounding, Calibrated):
    """A pass that can choose each layer's bits by the layer's measured error, within a budget or a gate."""

    spreads: ClassVar[bool] = True
    budget: Annotated[float | str | None, AfterValidator(_checked)] = Field(
        None,
        description="Mean bits of a rounded weight with its scales, 2 to 8.5; or the size of all weights, also of those that are not rounded, as `100MB` or as `35%` of the model that the pass is given. Each layer's error is measured for every candidate, and the bits go where they help most.",
    )
    candidates: tuple[Bits, ...] = Field((4, 8), min_length=2, max_length=7, description="Bits to choose from.")

    @model_validator(mode="after")
    def _budget_alone(self) -> Self:
        if self.budget is not None and self.within is not None:
            raise ValueError("`budget` and `within` both choose the bits: name one of them")
        if self.chooses_bits and (self.overrides or not self.symmetric or self.embeddings):
            chooser = "`budget`" if self.within is None else "`within`"
            raise ValueError(_ONE_GRID.format(chooser) + ", `embeddings` at false, and name no `overrides`")
        return self

    @property
    def chooses_bits(self) -> bool:
        """Whether each layer gets its bits by its measured error."""
        return self.budget is not None or self.within is not None

    def describe(self) -> str:
        if not self.chooses_bits:
            return super().describe()
        if self.within is not None:
            return f"int{', int'.join(map(str, self.candidates))}, the fewest bytes with {self.within}"
        limit = self.budget if isinstance(self.budget, str) else f"{self.budget:g} bits a weight"
        return f"{limit} from int{', int'.join(map(str, self.candidates))} by measured error"

    def candidate(self, bits: int) -> Scheme:
        return replace(self._plain, bits=bits)

    def schemes(self, module: str) -> Collection[Scheme]:
        if not self.chooses_bits:
            return super().schemes(module)
        return {self.candidate(bits) for bits in self.candidates}

    def _possible(self) -> list[Scheme]:
        return super()._possible() if self.budget is None else [self.candidate(bits) for bits in self.candidates]

    def check(self, header: ModelHeader) -> None:
        super().check(header)
        if self.budget is not None:
            self.room(header.tensors, self._taken(header))

    def room(self, tensors: Iterable[TensorInfo], rounded: Collection[str]) -> int:
        """Return the bytes that the budget leaves for the rounded weights.

        tensors: all of the model. rounded: names of the weights to round. Raises NightpressError(invalid_recipe), with the smallest
        possible budget, if the fewest bits for every layer take more.
        """
        assert self.budget is not None
        everything = list(tensors)
        weights = [weight for weight in everything if weight.name in rounded]
        least = sum(self.candidate(min(self.candidates)).stored_bytes(weight) for weight in weights)
        whole = sum(weight.size for weight in everything)
        kept = whole - sum(weight.size for weight in weights)
        fewest = f"int{min(self.candidates)}"
        if isinstance(self.budget, str):
            room = int(_bytes_of(self.budget, whole)) - kept
            smallest = f"{math.ceil((kept + least) / 1e4) / 100:.2f}MB, or {math.ceil(1000 * (kept + least) / whole) / 10:.1f}%"
            short = f"a budget of {self.budget} is less than the least it could be, {smallest}: {kept / 1e6:.2f} MB stay as they are, and {fewest} everywhere else takes {least / 1e6:.2f} MB with its scales"
        else:
            count = sum(weight.shape[0] * weight.shape[1] for weight in weights)
            room = int(self.budget * count / 8)
            short = f"a budget of {self.budget:g} bits a weight is less than {fewest} takes everywhere, {8 * least / count:.2f} with its scales"
        if room < least:
            raise invalid(f"`{self.name}`: {short}.", "Raise `budget`, or name fewer bits in `candidates`.")
        return room

    def settled(self, header: ModelHeader) -> Self:
        if not isinstance(self.budget, str):
            return self
        taken = self._taken(header)
        count = sum(tensor.shape[0] * tensor.shape[1] for tensor in header.tensors if tensor.name in taken)
        return self.model_copy(update={"budget": 8 * self.room(header.tensors, taken) / count})

    def _taken(self, header: ModelHeader) -> frozenset[str]:
        return frozenset(tensor.name for tensor in header.tensors if self.takes(tensor))

    def stored_bytes(self, tensor: TensorInfo) -> int:
        if not self.takes(tensor) or (self.within is None and not isinstance(self.budget, float)):
            return super().stored_bytes(tensor)
        most = self.candidate(max(self.candidates)).stored_bytes(tensor)
        if isinstance(self.budget, float):
            return min(most, int(self.budget * tensor.shape[0] * tensor.shape[1] / 8))
        return most

    @property
    def coarsest_bits(self) -> int:
        return min(self.candidates) if self.chooses_bits else super().coarsest_bits

    def most_results(self, header: ModelHeader) -> int:
        return 1 + len(self._taken(header)) * (len(self.candidates) - 1)

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        once = self._once(header, calibration)
        runs = max(1, self.tries(header)) + self.chooses_bits  # of them, one measures each layer's error
        return once.times(runs)

    def _once(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return blocks_cost(header, calibration, bits=self.coarsest_bits, in_parts=True)


class Awq(Budgeted):
    """Scale up columns with large inputs before rounding to nearest; the layers before them are divided by the scales (arXiv 2306.00978).

    Where the layers before can take factors is found on the model and proved on each block; a model without such a place is refused when it
    is pressed. The result is `pack-quantized`.
    """

    pass_: Literal["awq"] = Field("awq", alias="pass")
    bits: Bits = 4
    symmetric: bool = False

    def _once(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return blocks_cost(header, calibration, bits=self.coarsest_bits, by_group=False, copies=True)
