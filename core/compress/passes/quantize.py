"""Quantization passes."""

import json
import shutil
import time
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors import safe_open
from safetensors.torch import save_file

from core.compress.passes.context import PassContext
from core.handoff.report import LayerEffect, PassRecord
from core.recipes.passes import WeightOnly
from core.recipes.plan import is_linear_weight


def weight_only(source: Path, target: Path, options: WeightOnly, context: PassContext) -> PassRecord:
    """Round every linear weight to the nearest step of its grid and write compressed-tensors `pack-quantized`."""
    start = time.monotonic()
    target.mkdir(parents=True)
    linears = {one.name for one in context.header.tensors if is_linear_weight(one, options.ignore)}
    layers, weight_map, total = [], {}, 0
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors":
            if path.name != "model.safetensors.index.json":
                shutil.copyfile(path, target / path.name)
            continue
        out = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                w = file.get_tensor(name)
                if name not in linears:
                    out[name] = w
                    continue
                top = 2 ** (options.bits - 1)
                g = w.float().reshape(w.shape[0], -1, options.group_size or w.shape[1])
                scale = (g.abs().amax(2, keepdim=True) / (top - 0.5)).clamp(min=1e-12).to(w.dtype).float()
                q = (g / scale).round().clamp(-top, top - 1)
                error = float((q * scale - g).norm() / g.norm())
                module = name.removesuffix(".weight")
                out[f"{module}.weight_packed"] = pack_to_int32(q.to(torch.int8).reshape(w.shape), options.bits)
                out[f"{module}.weight_scale"] = scale.squeeze(2).to(w.dtype).contiguous()
                out[f"{module}.weight_shape"] = torch.tensor(w.shape)
                after = sum(t.nbytes for n, t in out.items() if n.startswith(module + ".weight_"))
                layers.append(LayerEffect(name=module, bytes_before=w.nbytes, bytes_after=after, relative_error=error))
        save_file(out, target / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(out, path.name)
        total += sum(t.nbytes for t in out.values())
    if len(set(weight_map.values())) > 1:
        (target / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            "group_0": {
                "targets": [one.name for one in layers],
                "weights": {
                    "num_bits": options.bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group" if options.group_size else "channel",
                    "group_size": options.group_size,
                },
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    context.progress(1.0, "rounded")
    return PassRecord(
        index=context.index, name="weight-only", seconds=time.monotonic() - start, summary={}, layers=tuple(layers)
    )
