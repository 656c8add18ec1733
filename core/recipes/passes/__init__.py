"""The passes a recipe may name. Each model says what it takes, what it needs and what it can be followed by."""

from typing import Annotated

from pydantic import Field

from core.recipes.passes.activations import DynamicInt8, Fp8, KvCache, SmoothQuant
from core.recipes.passes.adapt import EarlyExit
from core.recipes.passes.base import ExportFormat, PassOptions
from core.recipes.passes.distill import Distill, Recover
from core.recipes.passes.prune import Magnitude, SparseGpt, Wanda
from core.recipes.passes.quantize import Awq, Gptq, WeightOnly
from core.recipes.passes.quantizing import Quantizing

__all__ = [
    "PASS_TYPES",
    "Awq",
    "Distill",
    "DynamicInt8",
    "EarlyExit",
    "ExportFormat",
    "Fp8",
    "Gptq",
    "KvCache",
    "Magnitude",
    "Pass",
    "PassOptions",
    "Quantizing",
    "Recover",
    "SmoothQuant",
    "SparseGpt",
    "Wanda",
    "WeightOnly",
]

Pass = Annotated[
    WeightOnly
    | Magnitude
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
    | DynamicInt8,
    Field(discriminator="pass_"),
]
PASS_TYPES: tuple[type[PassOptions], ...] = (
    WeightOnly,
    Magnitude,
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
    DynamicInt8,
)
