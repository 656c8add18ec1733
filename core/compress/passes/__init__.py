"""The passes: functions from a model folder, its options and a context to a model folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.passes.activations import fp8, kv_cache, smoothquant
from nightpress.core.compress.passes.aware import qat
from nightpress.core.compress.passes.cache import generation_cache
from nightpress.core.compress.passes.calibrated import awq, gptq, sparsegpt, wanda
from nightpress.core.compress.passes.depth import early_exit
from nightpress.core.compress.passes.distill import distill, recover
from nightpress.core.compress.passes.prune import magnitude
from nightpress.core.compress.passes.quantize import weight_only
from nightpress.core.compress.passes.shrink import layers, narrow
from nightpress.core.handoff.report import PassRecord

__all__ = ["MODEL_PASSES", "ModelPass", "PassContext"]

#: (source folder, target folder that doesn't exist yet, options, context) → what was done. `target` is a whole model folder afterwards.
ModelPass = Callable[[Path, Path, Any, PassContext], PassRecord]

#: By the name a recipe calls them.
MODEL_PASSES: dict[str, ModelPass] = {
    "weight-only": weight_only,
    "magnitude": magnitude,
    "channels": narrow,
    "heads": narrow,
    "layers": layers,
    "gptq": gptq,
    "awq": awq,
    "smoothquant": smoothquant,
    "fp8": fp8,
    "kv-cache": kv_cache,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
    "distill": distill,
    "recover": recover,
    "early-exit": early_exit,
    "generation-cache": generation_cache,
    "qat": qat,
}
