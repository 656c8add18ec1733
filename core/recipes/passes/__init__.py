"""The passes a recipe may name. Each model says what it takes, what it needs and what it can be followed by."""

from typing import Annotated

from pydantic import Field

from core.recipes.passes.base import ExportFormat, PassOptions
from core.recipes.passes.prune import Magnitude, SparseGpt, Wanda
from core.recipes.passes.quantize import Awq, DynamicInt8, Gptq, WeightOnly

__all__ = [
    "PASS_TYPES",
    "Awq",
    "DynamicInt8",
    "ExportFormat",
    "Gptq",
    "Magnitude",
    "Pass",
    "PassOptions",
    "SparseGpt",
    "Wanda",
    "WeightOnly",
]

Pass = Annotated[WeightOnly | Magnitude | Gptq | Awq | SparseGpt | Wanda | DynamicInt8, Field(discriminator="pass_")]
PASS_TYPES: tuple[type[PassOptions], ...] = (WeightOnly, Magnitude, Gptq, Awq, SparseGpt, Wanda, DynamicInt8)
