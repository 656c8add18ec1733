"""Whether transformers can load a model's codes into its modules, found on the model itself, on the meta device."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from nightpress.core.compress.model.on_meta import Built, WithoutWeights, build
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.linears import is_expert


def takes_codes(model_dir: Path, rounded: Collection[str], kept: Collection[str]) -> bool:
    """Return whether transformers loads codes in place of these modules' weights. Else it must dequantize them while it loads them.

    It can't if a module has another name in transformers than in the files, or if the class reads the weight of a module, which a packed
    module has not, before the files are read. rounded: names of modules in the files. kept: of the other modules with a matrix.
    """
    try:
        built = build(model_dir, [f"{name}.weight" for name in (*rounded, *kept)], torch.float32)
    except NightpressError:
        return True  # the consumer that loads the artifact says what is wrong
    modules = {stored.removesuffix(".weight"): name.removesuffix(".weight") for name, stored in built.names.items()}
    own = {name: modules[name] for name in rounded if name in modules and not is_expert(name)}
    if any(not _same(stored, name) for stored, name in own.items()):
        return False
    return _starts_without_weights(built, own.values())


def _same(stored: str, name: str) -> bool:
    """Whether two names of a module differ at most in what stands before them."""
    return stored == name or stored.endswith(f".{name}") or name.endswith(f".{stored}")


def _starts_without_weights(built: Built, modules: Collection[str]) -> bool:
    for name in modules:
        layer = built.model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            del layer._parameters["weight"]
    try:
        with WithoutWeights():
            for module in built.model.modules():
                built.model._init_weights(module)
    except AttributeError:
        return False
    except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError):
        return True  # the meta device can't compute what the class begins with
    return True
