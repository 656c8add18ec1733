"""The passes a recipe may name. Each model says what it takes, what it needs and what it can be followed by."""

from typing import Annotated

from pydantic import Field

from nightpress.core.recipes.passes.activations import DynamicInt8, Fp8, KvCache, SmoothQuant, StaticInt8
from nightpress.core.recipes.passes.adapt import EarlyExit
from nightpress.core.recipes.passes.aware import Qat
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions
from nightpress.core.recipes.passes.caching import GenerationCache
from nightpress.core.recipes.passes.distill import Distill, Recover
from nightpress.core.recipes.passes.measure import Profiling
from nightpress.core.recipes.passes.prune import Magnitude, SparseGpt, Wanda
from nightpress.core.recipes.passes.quantize import Awq, Gptq, WeightOnly
from nightpress.core.recipes.passes.quantizing import Quantizing
from nightpress.core.recipes.passes.shrink import Channels, Heads, Layers

__all__ = [
    "PASS_TYPES",
    "Awq",
    "Channels",
    "Distill",
    "DynamicInt8",
    "EarlyExit",
    "ExportFormat",
    "Fp8",
    "GenerationCache",
    "Gptq",
    "Heads",
    "KvCache",
    "Layers",
    "Magnitude",
    "Pass",
    "PassOptions",
    "Profiling",
    "Qat",
    "Quantizing",
    "Recover",
    "SmoothQuant",
    "SparseGpt",
    "StaticInt8",
    "Wanda",
    "WeightOnly",
]

Pass = Annotated[
    WeightOnly
    | Magnitude
    | Channels
    | Heads
    | Layers
    | Profiling
    | Gptq
    | Awq
    | SmoothQuant
    | Fp8
    | KvCache
    | SparseGpt
    | Wanda
    | Distill
    | Recover
    | EarlyExit
    | GenerationCache
    | Qat
    | DynamicInt8
    | StaticInt8,
    Field(discriminator="pass_"),
]
PASS_TYPES: tuple[type[PassOptions], ...] = (
    WeightOnly,
    Magnitude,
    Channels,
    Heads,
    Layers,
    Profiling,
    Gptq,
    Awq,
    SmoothQuant,
    Fp8,
    KvCache,
    SparseGpt,
    Wanda,
    Distill,
    Recover,
    EarlyExit,
    GenerationCache,
    Qat,
    DynamicInt8,
    StaticInt8,
)
