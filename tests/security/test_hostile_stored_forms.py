"""Configs and tensors that say nonsense about codes and adapters are refused, and never crash a reader."""

import contextlib
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.adapters import read_adapter
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.stored_forms import float_view

_METHODS = ("auto-round", "awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4")
_GROUPS: list[Any] = [
    {"g": {"weights": {"num_bits": 4, "group_size": 32, "block_structure": [1, 2]}}},
    {"g": None},
    {"g": {"weights": [1]}},
]
_VALUES: list[Any] = [None, 0, -1, 4, [4], {}, "x", True, 1.5, [128, 128], [0, 0], [[]], 10**30, *_GROUPS]
_KEYS = (
    "bits",
    "w_bit",
    "group_size",
    "weight_block_size",
    "config_groups",
    "checkpoint_format",
    "packing_format",
    "version",
)
_LEAVES = (
    *("weight", "weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "weight_zero_point", "weight_global_scale"),
    *("weight_scale_2", "qweight", "qzeros", "scales", "g_idx", "x_blocks", "x_scales", "SCB", "bias"),
    *("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
)  # fmt: skip
_WIDTHS = {"F32": 4, "I8": 1, "U8": 1, "I32": 4, "F8_E4M3": 1, "BF16": 2, "I64": 8}
_OPTIONS = (
    "use_dora",
    "lora_alpha",
    "alpha_pattern",
    "fan_in_fan_out",
    "use_rslora",
    "init_lora_weights",
    "target_parameters",
)
_PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "lora_embedding_B",
    "weight",
    "bias",
    "",
)


def _tensors(chance: random.Random, prefix: str, leaves: Sequence[str]) -> list[TensorInfo]:
    found = []
    for leaf in chance.sample(leaves, chance.randint(0, 7)):
        dtype, shape = (
            chance.choice(list(_WIDTHS)),
            tuple(chance.choice([0, 1, 2, 4, 16, 32]) for _ in range(chance.randint(0, 4))),
        )
        found.append(TensorInfo(name=prefix + leaf, dtype=dtype, shape=shape, size=math.prod(shape) * _WIDTHS[dtype]))
    return found


@pytest.mark.slow
def test_nonsense_about_codes_is_refused_or_read() -> None:
    chance, read = random.Random(1), 0
    for _ in range(6000):
        quantization = {"quant_method": chance.choice([*_METHODS, *_VALUES])}
        quantization |= {key: chance.choice(_VALUES) for key in chance.sample(_KEYS, chance.randint(0, 4))}
        config = {key: chance.choice(_VALUES) for key in ("dtype", "text_config")}
        config["quantization_config"] = chance.choice([quantization] * 5 + _VALUES)
        small = chance.choice([b'{"shape": [4, 4], "blocksize": 64}', bytes(16), b"\xff" * 16])
        with contextlib.suppress(NightpressError):
            float_view(config, _tensors(chance, "m.", _LEAVES), lambda _name, small=small: small)  # type: ignore[misc]
            read += 1
    assert read > 100


@pytest.mark.slow
def test_nonsense_about_adapters_is_refused_or_read() -> None:
    chance = random.Random(2)
    base = [TensorInfo(name="m.weight", dtype="F32", shape=(4, 4), size=64)]
    for _ in range(6000):
        config = {"peft_type": "LORA"} | {
            key: chance.choice(_VALUES) for key in chance.sample(_OPTIONS, chance.randint(0, 4))
        }
        with contextlib.suppress(NightpressError):
            read_adapter(chance.choice([config] * 5 + _VALUES), _tensors(chance, "base_model.model.m.", _PARTS), base)
