"""Presses of small models by one process and by several, and how far apart the results are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nightpress.core.compress.executors.blocks import Method, RunResult, press_blocks
from nightpress.core.compress.passes.activations import CacheScales, RoundedInputs
from nightpress.core.compress.passes.calibrated import ActivationAware, Quantized, Sparse, WeightAndActivation
from nightpress.core.compress.passes.learned_rounding import Learned
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import Awq, Fp8, Gptq, KvCache, LearnedRounding, SmoothQuant, SparseGpt, Wanda
from tests.block_models import FAMILIES, context_of, linears_of, token_ids

DENSE, MIXTURE = "LlamaForCausalLM", "Qwen3MoeForCausalLM"
TYPES = {
    DENSE: "llama",
    MIXTURE: "qwen3_moe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "unknown",  # so that places for factors are found by running a block
}
#: Largest distance of weights from those of one process, relative to their norm. Sums in another order differ by about 1e-7 here.
SAME = 1e-5
METHODS: dict[str, Callable[[ModelHeader], tuple[Method, Any]]] = {
    "gptq": lambda _: _of(Quantized, Gptq(group_size=16)),
    "gptq with unstructured zeros": lambda _: _of(Quantized, Gptq(group_size=16, sparsity=0.5, order="natural")),
    # A search of ranges may end otherwise where two are equally good: the order of sums then decides, and all later blocks differ.
    "awq": lambda header: _of(ActivationAware, Awq(group_size=16, ranges="extremes"), header),
    "sparsegpt 2:4": lambda _: (Sparse(SparseGpt(pattern="2:4")), None),
    "sparsegpt": lambda _: (Sparse(SparseGpt()), None),
    "wanda": lambda _: (WeightAndActivation(Wanda()), None),
    "smoothquant": lambda header: (RoundedInputs(SmoothQuant(), header), None),
    "smoothquant without a search": lambda header: (RoundedInputs(SmoothQuant(alpha=0.5), header), None),
    "smoothquant by gptq": lambda header: (
        RoundedInputs(SmoothQuant(activations="tensor", weights="gptq"), header),
        None,
    ),
    "fp8": lambda header: (RoundedInputs(Fp8(activations="static"), header), None),
    "learned rounding": lambda _: (Learned(options := LearnedRounding(group_size=16, steps=10), options.scheme, None, 0), 4),
    "kv-cache": lambda _: (CacheScales(KvCache()), None),
}  # fmt: skip


def _of(method: Any, options: Any, *more: Any) -> tuple[Method, None]:
    return method(options, options.scheme, *more), None


def run(
    source: Path,
    family: str,
    name: str,
    folder: Path,
    ranks: Ranks | None,
    *,
    samples: Mapping[str, Tensor] | None = None,
    **extra: Any,
) -> RunResult:
    """Press a model with a method of METHODS in folder/passes."""
    config = FAMILIES[family]
    header = ModelHeader(model_type=TYPES[family], architecture=family, config=config, tensors=(), has_tokenizer=False)
    method, step = METHODS[name](header)
    chosen = frozenset() if name == "kv-cache" else linears_of(source)
    pressed = press_blocks(
        source,
        folder / "passes",
        method,
        samples or {"input_ids": token_ids(samples=9)},
        context_of(source, folder, ranks=ranks, **extra),
        chosen=chosen,
        recipe=name,
        cache=method.cache if isinstance(method, CacheScales) else None,
        step=step,
    )
    assert pressed.effects.keys() == (chosen - {"lm_head.weight", "model.embed_tokens.weight"})
    return pressed


def padded(lengths: list[int]) -> dict[str, Tensor]:
    """Texts of these lengths, padded to 24 tokens, and their mask."""
    mask = (torch.arange(24) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": token_ids(samples=len(lengths)), "attention_mask": mask}


def load(folder: Path) -> dict[str, Tensor]:
    """The tensors that a press has written."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The distance of all tensors but codes, relative to their norm."""
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    floats = [name for name in expected if expected[name].is_floating_point()]
    lost = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in floats)
    return float((lost / sum(float(expected[name].double().square().sum()) for name in floats)) ** 0.5)


def other_codes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The share of bytes of codes that differ."""
    codes = [name for name in expected if not expected[name].is_floating_point()]
    pairs = [(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in codes]
    return sum(int((a != b).sum()) for a, b in pairs) / max(1, sum(a.numel() for a, _ in pairs))
