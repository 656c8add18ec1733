"""Writes a pressed model as a plain float model, with the weights that its codes stand for: what a loader should compute with."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nightpress.core.compress.grids.stored import from_tensors
from nightpress.core.compress.model.checkpoint import (
    SAFETENSORS_DTYPES,
    tensor_info,
    write_index,
    write_json,
    write_tensors,
)
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.recipes.schemes import BLOCK, Activations, Scheme, Strategy

_PARTS = ("_packed", "_scale", "_shape", "_zero_point", "_global_scale")
_CACHE_SCALES = (".k_scale", ".v_scale")


class StoredWeights:
    """The weights of a folder under their names in the float model, dequantized if they are codes of any scheme."""

    def __init__(self, model_dir: Path) -> None:
        self._source = SourceTensors.in_folder(model_dir)
        held = self._source.names()
        self.quantized = sorted(name.removesuffix("_scale") for name in held if name.endswith("weight_scale"))
        parts = {name + part for name in self.quantized for part in _PARTS}
        modules = [name.removesuffix("weight") for name in self.quantized]
        parts |= {module + part for module in modules for part in ("input_scale", "input_global_scale")}
        kept = {name for name in held if name not in parts and not name.endswith(_CACHE_SCALES)}
        self.names = sorted(kept | set(self.quantized))
        #: The dtype of the floats, in which the model computes: that of the scales where the format doesn't fix theirs.
        self.dtype = self._dtype(kept - set(self.quantized))

    def _dtype(self, floats: Iterable[str]) -> torch.dtype:
        found = [self._source.stored(name).info for name in floats]
        largest = max((info for info in found if info.dtype in {"F32", "BF16", "F16"}), key=lambda info: info.size)
        return next(dtype for dtype, name in SAFETENSORS_DTYPES.items() if name == largest.dtype)

    def stored_dtype(self, name: str) -> str:
        """The dtype's name in safetensors; of a quantized weight, the one that the model's floats have."""
        return SAFETENSORS_DTYPES[self.dtype] if name in self.quantized else self._source.stored(name).info.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.quantized:
            return self._source.stored(name).info.shape
        if f"{name}_shape" in self._source:
            rows, columns = self._source.read(f"{name}_shape").tolist()
            return int(rows), int(columns)
        if f"{name}_packed" in self._source:  # two numbers of fp4 in a byte
            rows, columns = self._source.stored(f"{name}_packed").info.shape
            return rows, 2 * columns
        return self._source.stored(name).info.shape

    def scheme(self, name: str) -> Scheme:
        """The scheme of a quantized weight, as its tensors' dtypes and shapes tell. Rounded activations are not told."""
        rows, columns = self.shape(name)
        groups = self._source.stored(f"{name}_scale").info.shape
        if f"{name}_shape" in self._source:
            words = self._source.stored(f"{name}_packed").info.shape[1]
            bits = next(bits for bits in range(1, 9) if -(-columns * bits // 32) == words)
            return Scheme(
                bits,
                strategy="group",
                group_size=columns // groups[1],
                symmetric=f"{name}_zero_point" not in self._source,
            )
        if f"{name}_packed" in self._source:
            nvfp4 = f"{name}_global_scale" in self._source
            return Scheme(4, "float", "group", group_size=16 if nvfp4 else 32)
        kind = self._source.stored(name).info.dtype
        strategy: Strategy = "tensor" if groups == (1,) else "channel"
        if len(groups) == 2 and groups != (rows, 1) and groups == (-(-rows // BLOCK), -(-columns // BLOCK)):
            strategy = "block"
        if kind == "I8":  # codes outside of 32-bit words belong to a scheme with rounded activations
            return Scheme(8, "int", strategy, activations=Activations())
        return Scheme(8, "float", strategy)

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of a quantized weight: `packed` or `codes`, `scale` and what else its format has, and `input_global_scale`."""
        found = {part[1:]: self._source.read(name + part) for part in _PARTS if name + part in self._source}
        total = name.removesuffix("weight") + "input_global_scale"
        if total in self._source:
            found["input_global_scale"] = self._source.read(total)
        return found if "packed" in found else found | {"codes": self._source.read(name)}

    def floats(self, name: str) -> Tensor:
        """The tensor as it is, or dequantized in float32 if it is quantized."""
        if name not in self.quantized:
            return self._source.read(name)
        parts = {
            part: self._source.read(part) for part in (name, *(name + part for part in _PARTS)) if part in self._source
        }
        return from_tensors(name, self.scheme(name), parts)


def write_dequantized(pressed: Path, target: Path) -> None:
    """Write the folder `target`: a float model in the pressed model's dtype, without scales of a key/value cache."""
    target.mkdir(parents=True)
    copy_companions(pressed, target)
    weights = StoredWeights(pressed)
    config = json.loads((pressed / "config.json").read_bytes())
    config.pop("quantization_config", None)
    write_json(target / "config.json", config)
    infos = [tensor_info(name, weights.stored_dtype(name), weights.shape(name)) for name in weights.names]
    floats = ((name, weights.floats(name)) for name in weights.names)
    tensors = ((name, tensor.to(weights.dtype) if name in weights.quantized else tensor) for name, tensor in floats)
    write_tensors(target / "model.safetensors", infos, tensors)
    write_index(target)
