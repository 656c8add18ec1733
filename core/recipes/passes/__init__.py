"""The passes a recipe may name. Each model says what it takes, what it needs and what it can be followed by."""

from typing import Annotated

from pydantic import Field

from core.recipes.passes.activations import DynamicInt8, Fp8, KvCache, SmoothQuant, StaticInt8
from core.recipes.passes.adapt import EarlyExit
from core.recipes.passes.aware import Qat
from core.recipes.passes.base import ExportFormat, PassOptions
from core.recipes.passes.caching import GenerationCache
from core.recipes.passes.distill import Distill, Recover
from core.recipes.passes.measure import Profiling
from core.recipes.passes.prune import Magnitude, SparseGpt, Wanda
from core.recipes.passes.quantize import Awq, Gptq, WeightOnly
from core.recipes.passes.quantizing import Quantizing
from core.recipes.passes.shrink import Channels, Heads, Layers

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
