"""A language model as mlx-lm reads it: safetensors with affine codes, ŵ = scale · q + bias, and config.json's `quantization`."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.grids.packing import pack_bits
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import TORCH_DTYPES, tensor_info, write_index, write_json, write_tensors
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.mlx import mlx_group

CONSUMER = Path(__file__).parents[1] / "runners" / "mlx_runner.py"
_SHARD_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class _Part:
    """A weight of the model, and the tensors that store it."""

    name: str
    infos: tuple[TensorInfo, ...]
    group_size: int = 0  #: 0: it is stored as it is
    bits: int = 0

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def size(self) -> int:
        return sum(info.size for info in self.infos)


def save(model_dir: Path, out_dir: Path) -> None:
    """Write the folder, one tensor at a time. Weights that a pass has rounded keep its codes, and all others their own type.

    Scales and biases have the type of the model. With zero points, a bias is a multiple of its scale that 16 bits may have to round.
    Raises NightpressError(invalid_recipe) if MLX's groups don't divide a layer's.
    """
    pressed, stored = PressedWeights(model_dir), SourceTensors.in_folder(model_dir)
    parts = [_part(pressed, stored, name) for name in pressed]
    shards = list(_shards(parts))
    copy_companions(model_dir, out_dir)
    for at, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{at:05}-of-{len(shards):05}.safetensors"
        infos = [info for part in shard for info in part.infos]
        tensors = (
            (info.name, tensor)
            for part in shard
            for info, tensor in zip(part.infos, _tensors(pressed, stored, part), strict=True)
        )
        write_tensors(out_dir / name, infos, tensors, {"format": "mlx"})
    write_index(out_dir)
    _describe(out_dir, parts)


def _part(pressed: PressedWeights, stored: SourceTensors, name: str) -> _Part:
    if name not in pressed.packed:
        return _Part(name, (stored.stored(name).info,))
    (rows, columns), grid = pressed.shape(name), pressed.grid(name)
    size = mlx_group(columns, grid.group_size)
    module, dtype = name.removesuffix(".weight"), stored.stored(f"{name}_scale").info.dtype
    if size is None:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"exports: in {module}, {grid.group_size} inputs share a scale, and MLX's groups of 32, 64 or 128 don't divide them.",
            hint="Use `group_size: 64` or 32, or leave the layer in float by `ignore`.",
        )
    infos = (
        tensor_info(name, "U32", (rows, columns * grid.bits // 32)),
        tensor_info(f"{module}.scales", dtype, (rows, columns // size)),
        tensor_info(f"{module}.biases", dtype, (rows, columns // size)),
    )
    return _Part(name, infos, size, grid.bits)


def _shards(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Divide the parts, in their order, into files of a few gigabytes."""
    shard: list[_Part] = []
    size = 0
    for part in parts:
        if shard and size + part.size > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.size
    yield shard


def _tensors(pressed: PressedWeights, stored: SourceTensors, part: _Part) -> tuple[Tensor, ...]:
    if not part.bits:
        return (stored.read(part.name),)
    codes = pressed.codes(part.name).in_blocks(part.group_size)
    dtype = TORCH_DTYPES[part.infos[1].dtype]
    # MLX's q is 0 … 2^bits − 1, and ours − 2^(bits−1): ŵ = scale · (code − zero) = scale · q − scale · (zero + 2^(bits−1)).
    scales = torch.from_numpy(codes.scale)
    least = torch.full_like(scales, 2 ** (part.bits - 1))
    if codes.zero_point is not None:
        least += torch.from_numpy(codes.zero_point)
    return (
        pack_bits(torch.from_numpy(codes.codes), part.bits),
        scales.to(dtype),
        (-scales * least).to(dtype),
    )


def _describe(out_dir: Path, parts: Sequence[_Part]) -> None:
    """Say in config.json how the weights are stored: the commonest grid, and the modules that have another."""
    path = out_dir / "config.json"
    config = json.loads(path.read_bytes())
    config.pop("quantization_config", None)
    config |= {key: value for key, value in _older_keys(config).items() if config.get(key) is None}
    grids = {part.module: {"group_size": part.group_size, "bits": part.bits} for part in parts if part.bits}
    if grids:
        config["quantization"] = _quantization(grids)
    write_json(path, config)


def _older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that mlx-lm reads and that transformers 5 no longer writes, or only where they are not the default."""
    found: dict[str, Any] = {}
    given = config.get("rope_parameters") or {}
    if "rope_theta" in given:  # where each kind of layer has its own, mlx-lm reads these
        found |= {key: given[key] for key in ("rope_theta", "partial_rotary_factor") if key in given}
        scaled = given.get("rope_type", "default") != "default"
        found["rope_scaling"] = {"type": given["rope_type"], **given} if scaled else None
    if "hidden_size" in config and "num_attention_heads" in config:
        found["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    return found


def _quantization(grids: Mapping[str, Mapping[str, int]]) -> dict[str, object]:
    [(pairs, _)] = Counter(tuple(grid.items()) for grid in grids.values()).most_common(1)
    common = dict(pairs)
    return {**common, "mode": "affine"} | {module: dict(grid) for module, grid in grids.items() if grid != common}
