"""The functions that run the passes. Importing this package imports every module of the folder, so that each function registers itself."""

import importlib
import pkgutil

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.passes.registry import MODEL_PASSES, ModelPass

__all__ = ["MODEL_PASSES", "ModelPass", "PassContext"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
