"""The options of each pass, with its requirements, its cost and the formats that carry its result. `catalog` finds every class here."""

from nightpress.core.recipes.passes.activations import DynamicInt8, Fp8, KvCache, SmoothQuant, StaticInt8
from nightpress.core.recipes.passes.adapt import EarlyExit
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions
from nightpress.core.recipes.passes.caching import GenerationCache
from nightpress.core.recipes.passes.distill import Distill, Recover
from nightpress.core.recipes.passes.embedders import StaticEmbeddings, TruncateEmbeddings
from nightpress.core.recipes.passes.experts import ExpertPruning
from nightpress.core.recipes.passes.gptq import Gptq
from nightpress.core.recipes.passes.k_quants import KQuants
from nightpress.core.recipes.passes.layers import Layers
from nightpress.core.recipes.passes.learned_rounding import LearnedRounding
from nightpress.core.recipes.passes.measure import Profiling
from nightpress.core.recipes.passes.named import Pass
from nightpress.core.recipes.passes.prune import Magnitude, SparseGpt, Wanda
from nightpress.core.recipes.passes.qat import Qat
from nightpress.core.recipes.passes.quantize import Awq, WeightOnly
from nightpress.core.recipes.passes.quantizing import Quantizing
from nightpress.core.recipes.passes.recover_scales import RecoverScales
from nightpress.core.recipes.passes.requantize import Requantize
from nightpress.core.recipes.passes.rotate import Rotate
from nightpress.core.recipes.passes.shape import ShapeToSpeed
from nightpress.core.recipes.passes.shrink import Channels, Heads
from nightpress.core.recipes.passes.vocabulary import Vocabulary

__all__ = [
    "Awq",
    "Channels",
    "Distill",
    "DynamicInt8",
    "EarlyExit",
    "ExpertPruning",
    "ExportFormat",
    "Fp8",
    "GenerationCache",
    "Gptq",
    "Heads",
    "KQuants",
    "KvCache",
    "Layers",
    "LearnedRounding",
    "Magnitude",
    "Pass",
    "PassOptions",
    "Profiling",
    "Qat",
    "Quantizing",
    "Recover",
    "RecoverScales",
    "Requantize",
    "Rotate",
    "ShapeToSpeed",
    "SmoothQuant",
    "SparseGpt",
    "StaticEmbeddings",
    "StaticInt8",
    "TruncateEmbeddings",
    "Vocabulary",
    "Wanda",
    "WeightOnly",
]
