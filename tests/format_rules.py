"""The rules that compressed-tensors' schema and vLLM's loaders set for a quantized folder, written from their side.

They concern names, dtypes and shapes. Layers that vLLM fuses must have the same scheme.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name

from tests.folders import load_tensors

#: The last parts of the names of layers that vLLM fuses into one product.
FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def check_folder(folder: Path, source: Path) -> dict[str, Any]:
    """Check a folder against the rules. `source`: the float model that it was made from. Returns its quantization_config."""
    raw = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    assert raw["quant_method"] == "compressed-tensors"
    config = QuantizationConfig.model_validate(raw)  # raises for unknown arguments and combinations
    formats = {group.format for group in config.config_groups.values()}
    assert config.format == (next(iter(formats)) if len(formats) == 1 else "mixed-precision" if formats else "dense")
    tensors, float_tensors = load_tensors(folder), load_tensors(source)
    schemes: dict[str, Any] = {}
    for name, weight in float_tensors.items():
        module = name.removesuffix(".weight")
        if module == name or weight.dim() != 2 or any(match_name(module, pattern) for pattern in config.ignore):
            continue
        groups = [
            group
            for group in config.config_groups.values()
            if any(match_name(module, target) for target in group.targets)
        ]
        assert len(groups) <= 1, f"{module} is meant by {len(groups)} groups"
        if groups:
            schemes[module] = groups[0]
            _check_weight(module, groups[0], weight, tensors)
        else:
            assert tensors[name].dtype == weight.dtype, f"{name} is in no group and no longer float"
    known = {f"{module}.{part}" for module, group in schemes.items() for part in _parts(group)}
    known |= float_tensors.keys()
    cache = {name for name in tensors if name.endswith((".k_scale", ".v_scale"))}
    assert tensors.keys() <= known | cache
    assert bool(cache) == (config.kv_cache_scheme is not None)
    for name in cache:
        assert tensors[name].shape == (1,)
        assert tensors[name].dtype in FLOATS
        assert name.rsplit(".", 2)[-2] == "self_attn"
    for fused in FUSED:
        by_layer: dict[str, list[Any]] = {}
        for module, group in schemes.items():
            above, _, leaf = module.rpartition(".")
            if leaf in fused:
                by_layer.setdefault(above, []).append(group.model_dump(exclude={"targets"}))
        for layer, several in by_layer.items():
            assert all(scheme == several[0] for scheme in several), f"{layer} is fused of different schemes"
    return dict(raw)


def _parts(group: Any) -> tuple[str, ...]:
    parts = tuple(BaseCompressor.get_value_from_registry(group.format).compression_param_names(group))
    if group.input_activations is not None and group.input_activations.dynamic is False:
        parts += ("input_scale",)
    if group.input_activations is not None and group.input_activations.dynamic == "local":
        parts += ("input_global_scale",)  # vLLM and compressed-tensors' own modules have it; its compressor forgets it
    return parts


def _check_weight(module: str, group: Any, weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    rows, columns = weight.shape
    arguments = group.weights
    found = {part: tensors[f"{module}.{part}"] for part in _parts(group)}
    widths = {None: columns, -1: columns}
    groups = columns // widths.get(arguments.group_size, arguments.group_size)
    scales = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, groups),
        "tensor_group": (rows, groups),
        "block": (math.ceil(rows / 128), math.ceil(columns / 128)),
    }[arguments.strategy]
    assert found["weight_scale"].shape == scales, module
    if group.format == "pack-quantized":
        bits = arguments.num_bits
        assert f"{module}.weight" not in tensors
        assert found["weight_packed"].dtype == torch.int32
        assert found["weight_packed"].shape == (rows, math.ceil(columns * bits / 32))
        assert found["weight_shape"].dtype == torch.int64
        assert found["weight_shape"].tolist() == [rows, columns]
        assert found["weight_scale"].dtype == weight.dtype
        if not arguments.symmetric:
            assert found["weight_zero_point"].dtype == torch.int32
            assert found["weight_zero_point"].shape == (math.ceil(rows * bits / 32), groups)
    elif group.format in {"int-quantized", "float-quantized"}:
        codes = torch.int8 if group.format == "int-quantized" else torch.float8_e4m3fn
        assert found["weight"].dtype == codes
        assert found["weight"].shape == (rows, columns)
        assert found["weight_scale"].dtype in FLOATS
        if "input_scale" in found:
            assert found["input_scale"].shape == (1,)
            assert float(found["input_scale"]) > 0
    else:
        assert found["weight_packed"].dtype == torch.uint8
        assert found["weight_packed"].shape == (rows, columns // 2)
        if group.format == "mxfp4-pack-quantized":
            assert found["weight_scale"].dtype == torch.uint8
        else:
            assert found["weight_scale"].dtype == torch.float8_e4m3fn
            assert bool(torch.isfinite(found["weight_scale"].float()).all())
            assert found["weight_global_scale"].dtype == torch.float32
            assert found["weight_global_scale"].shape == (1,)
            if group.input_activations is not None:
                assert found["input_global_scale"].dtype == torch.float32
                assert found["input_global_scale"].shape == (1,)
                assert 0 < float(found["input_global_scale"]) < math.inf
