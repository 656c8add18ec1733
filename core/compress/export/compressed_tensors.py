"""A quantized model in the formats of compressed-tensors, as transformers and vLLM read them."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nightpress.core.compress.checkpoint import write_file
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.safetensors import CONSUMER
from nightpress.core.recipes.readable import become_floats
from nightpress.core.recipes.schemes import Scheme

__all__ = ["CACHE_FILE", "CONSUMER", "save", "write_config"]

#: What `kv-cache` leaves in a model's folder for whoever writes its quantization_config.
CACHE_FILE = "kv_cache_scheme.json"


def save(model_dir: Path, out_dir: Path) -> None:
    """Put the finished model folder at `out_dir`."""
    safetensors.save(model_dir, out_dir)
    if (out_dir / CACHE_FILE).exists():  # no pass after `kv-cache` has quantized weights
        write_config(out_dir, {}, kept=())


def write_config(model_dir: Path, schemes: Mapping[str, Scheme], *, kept: Iterable[str]) -> None:
    """Say in config.json how the model's weights are stored: the quantized modules with their schemes, and the modules that are not."""
    path, cache = model_dir / "config.json", model_dir / CACHE_FILE
    config = json.loads(path.read_bytes())
    cache_scheme = json.loads(cache.read_bytes()) if cache.exists() else None
    config["quantization_config"] = quantization_config(
        schemes, kept=kept, cache_scheme=cache_scheme, as_floats=become_floats(config["model_type"], schemes)
    )
    if cache_scheme is not None:
        # transformers asks for the number that a family without groups of heads doesn't state.
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    write_file(path, json.dumps(config, indent=2).encode() + b"\n")
    cache.unlink(missing_ok=True)


def quantization_config(
    schemes: Mapping[str, Scheme],
    *,
    kept: Iterable[str],
    cache_scheme: dict[str, Any] | None = None,
    as_floats: bool = False,
) -> dict[str, Any]:
    """The description that loaders follow: exactly the quantized modules are targets.

    Targets are named, not meant by their class: an output head tied to the embeddings is a Linear without a weight of its own in the
    files, and would be taken for a quantized one. Layer numbers are generalised where all such layers have one scheme, so that a
    100-layer model has as few targets as a small one, and what stands before the first number may be missing or different, as it is
    when a loader puts the model under another head. What such a target would wrongly cover is ignored by name.
    """
    meant: dict[str, set[Scheme]] = {}
    for name, scheme in schemes.items():
        meant.setdefault(_pattern(name), set()).add(scheme)
    targets: dict[Scheme, set[str]] = {}
    for name, scheme in schemes.items():
        alike = len(meant[_pattern(name)]) == 1
        targets.setdefault(scheme, set()).add(_pattern(name, exact=not alike))
    every = [target for some in targets.values() for target in some]
    ignore = sorted({_pattern(name, exact=True) for name in kept if any(re.match(one[3:], name) for one in every)})
    formats = list(dict.fromkeys(scheme.format for scheme in targets))
    assert not as_floats or len(targets) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": cache_scheme,
        "ignore": ignore,
        **({"dequantize": True} if as_floats else {}),
        "config_groups": {
            f"group_{number}": {
                "targets": sorted(some),
                "format": scheme.format,
                "input_activations": scheme.activation_arguments(),
                "output_activations": None,
                "weights": scheme.weight_arguments(),
            }
            for number, (scheme, some) in enumerate(targets.items())
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
