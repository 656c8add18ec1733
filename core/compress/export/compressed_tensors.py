"""A quantized model in the compressed-tensors format `pack-quantized`, as transformers and vLLM read it."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.compress.checkpoint import write_file
from core.compress.export.safetensors import CONSUMER, save
from core.compress.solvers.grid import Grid

__all__ = ["CONSUMER", "save", "write_config"]


def write_config(model_dir: Path, grid: Grid, *, quantized: Iterable[str], kept: Iterable[str]) -> None:
    """Say in config.json how the model's weights are stored. `quantized` and `kept` are the names of its linear modules."""
    path = model_dir / "config.json"
    config = json.loads(path.read_bytes())
    config["quantization_config"] = quantization_config(grid, quantized=quantized, kept=kept)
    write_file(path, json.dumps(config, indent=2).encode() + b"\n")


def quantization_config(grid: Grid, *, quantized: Iterable[str], kept: Iterable[str]) -> dict[str, Any]:
    """The description that loaders follow: exactly the quantized modules are targets.

    Targets are named, not meant by their class: an output head tied to the embeddings is a Linear without a weight of its own in the
    files, and would be taken for a quantized one. Layer numbers are generalised, so that a 100-layer model has as few targets as a
    small one, and what stands before the first number may be missing or different, as it is when a loader puts the model under
    another head. What such a target would wrongly cover is ignored by name.
    """
    quantized, kept = list(quantized), list(kept)
    targets = sorted({_pattern(name) for name in quantized})
    ignore = sorted(
        {_pattern(name, exact=True) for name in kept if any(re.match(target[3:], name) for target in targets)}
    )
    # transformers prepares modules for packed weights without packing their zero points (compressed-tensors up to 0.20),
    # and then refuses the files. Dequantizing while it loads is its way round that; vLLM doesn't read the key.
    loading = {} if grid.symmetric else {"dequantize": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        **loading,
        "config_groups": {
            "group_0": {
                "targets": targets,
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": grid.bits,
                    "type": "int",
                    "symmetric": grid.symmetric,
                    "strategy": "channel" if grid.group_size is None else "group",
                    "group_size": grid.group_size,
                    "dynamic": False,
                    "actorder": None,
                    "block_structure": None,
                    "observer": "minmax",
                    "observer_kwargs": {},
                },
            }
        },
    }


def _pattern(module: str, *, exact: bool = False) -> str:
    """`model.layers.3.mlp.up_proj` → a pattern for the same module of every layer: `re:(.*\\.)?layers\\.\\d+\\.mlp\\.up_proj$`. `exact` keeps the numbers."""
    parts = module.split(".")
    first_number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    if first_number:
        parts = parts[first_number - 1 :]
    return (
        "re:(.*\\.)?" + "\\.".join(r"\d+" if part.isdigit() and not exact else re.escape(part) for part in parts) + "$"
    )
