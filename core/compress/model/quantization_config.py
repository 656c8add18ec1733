"""The part of config.json that describes how a model's weights are stored, in the format of compressed-tensors."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nightpress.core.compress.model.checkpoint import write_json
from nightpress.core.compress.model.loading import takes_codes
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.linears import is_expert
from nightpress.core.recipes.readable import become_floats
from nightpress.core.recipes.schemes import Scheme

#: The pass `kv-cache` writes this file into a model's folder. `write_config` moves its content into quantization_config.
CACHE_FILE = "kv_cache_scheme.json"


def write_config(model_dir: Path, schemes: Mapping[str, Scheme], *, kept: Collection[str]) -> None:
    """Describe in config.json how the model's weights are stored. schemes: by quantized module; kept: modules that are not quantized."""
    path, cache = model_dir / "config.json", model_dir / CACHE_FILE
    config = json.loads(path.read_bytes())
    cache_scheme = json.loads(cache.read_bytes()) if cache.exists() else None
    as_floats = become_floats(config["model_type"], schemes) or not takes_codes(model_dir, schemes, kept)
    if as_floats and len(set(schemes.values())) > 1:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"transformers reads one grid alone of a {config['model_type']}, and the pass chose several.",
            hint="Leave out `overrides` and `budget`.",
        )
    config["quantization_config"] = quantization_config(
        schemes, kept=kept, cache_scheme=cache_scheme, as_floats=as_floats
    )
    if cache_scheme is not None and "num_attention_heads" in config:
        # transformers needs this number, but the config of a family without grouped heads lacks it.
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    write_json(path, config)
    cache.unlink(missing_ok=True)


def quantization_config(
    schemes: Mapping[str, Scheme],
    *,
    kept: Collection[str],
    cache_scheme: dict[str, Any] | None = None,
    as_floats: bool = False,
) -> dict[str, Any]:
    """The quantization_config that loaders read. Its targets match exactly the quantized modules.

    Targets are patterns of names, not the class Linear. An output head tied to the embeddings is a Linear without a weight of its own in
    the files, and the class would match it. If a module has the same scheme in all layers, its pattern matches any layer number, so a model
    of 100 layers has as few targets as a small one. The part of the name before the first number may be missing or different, because
    loaders put the model under other heads. Modules that a pattern would match by mistake are listed by name under `ignore`. If such a name
    without its first part would be that of a quantized module (a model with a second tower), more of the names is kept.
    """
    depth = _depth(schemes, kept)
    # transformers takes the first group with "experts" in a target for that of the experts: `shared_experts` must not come before it.
    meant: dict[str, set[Scheme]] = {}
    for name, scheme in schemes.items():
        meant.setdefault(_pattern(name, depth), set()).add(scheme)
    targets: dict[Scheme, set[str]] = {}
    for name, scheme in sorted(schemes.items(), key=lambda pair: not is_expert(f"{pair[0]}.")):
        alike = len(meant[_pattern(name, depth)]) == 1
        targets.setdefault(scheme, set()).add(_pattern(name, depth, exact=not alike))
    every = [target for some in targets.values() for target in some]
    ignore = sorted(
        {_pattern(name, depth, exact=True) for name in kept if any(re.match(target[3:], name) for target in every)}
    )
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


def _depth(schemes: Collection[str], kept: Collection[str]) -> int:
    """The fewest parts of the names before the first number that tell all quantized modules from the others."""
    most = max((len(name.split(".")) for name in schemes), default=1)
    for depth in range(1, most):
        known = {_pattern(name, depth, exact=True) for name in schemes}
        if known.isdisjoint(_pattern(name, depth, exact=True) for name in kept):
            return depth
    return most


def _pattern(module: str, depth: int, *, exact: bool = False) -> str:
    """A pattern for the same module in every layer. exact: keep the layer numbers. depth: parts of the name before the first number.

    `model.layers.3.mlp.up_proj` → `re:(.*\\.)?layers\\.\\d+\\.mlp\\.up_proj$`.
    """
    parts = module.split(".")
    first_number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    if first_number:
        parts = parts[max(0, first_number - depth) :]
    return (
        "re:(.*\\.)?" + "\\.".join(r"\d+" if part.isdigit() and not exact else re.escape(part) for part in parts) + "$"
    )
