"""Every scheme that we write, as the passes that write it, and the tiny models that they are tried on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.every_family import save_family

Passes = list[dict[str, Any]]

_INT = {"pass": "weight-only"}
_INT4 = _INT | {"bits": 4, "group_size": 128}
_INT8_GROUPS = _INT | {"group_size": 128}
_FP4 = {"pass": "gptq", "format": "mxfp4"}
_ROUNDED = {"pass": "smoothquant"}
_FP8 = {"pass": "fp8"}

SCHEMES: Mapping[str, Passes] = {
    "int8 weights, a scale a row": [_INT],
    "int8 weights, a scale a row, zero points": [_INT | {"symmetric": False}],
    "int8 weights, groups": [_INT8_GROUPS],
    "int8 weights and embeddings": [_INT | {"embeddings": True}],
    "int4 weights, a scale a row": [_INT4 | {"group_size": None}],
    "int4 weights, a scale a row, zero points": [_INT4 | {"group_size": None, "symmetric": False}],
    "int4 weights, groups": [_INT4],
    "int4 weights, groups, zero points": [_INT4 | {"symmetric": False}],
    "int4 and int8 weights": [_INT4 | {"overrides": {"re:.*down_proj": {"bits": 8}}}],
    "int3 weights, groups": [_INT4 | {"bits": 3}],
    "int2 weights, groups": [_INT4 | {"bits": 2}],
    "fp8 weights": [_INT | {"format": "fp8"}],
    "mxfp4 weights": [_FP4],
    "mxfp4 weights, fp8 inputs": [_FP4 | {"activations": "fp8"}],
    "mxfp4 weights and inputs": [_FP4 | {"activations": "fp4"}],
    "nvfp4 weights": [_FP4 | {"format": "nvfp4"}],
    "nvfp4 weights and inputs": [_FP4 | {"format": "nvfp4", "activations": "fp4"}],
    "int8 weights and inputs, by token": [_ROUNDED],
    "int8 weights and inputs, static": [_ROUNDED | {"activations": "tensor"}],
    "fp8 weights and inputs, by token": [_FP8],
    "fp8 weights and inputs, a scale a tensor": [_FP8 | {"weights": "tensor"}],
    "fp8 weights and inputs, blocks": [_FP8 | {"weights": "block"}],
    "fp8 weights and inputs, static": [_FP8 | {"activations": "static"}],
    "fp8 cache": [{"pass": "kv-cache"}],
    "int8 cache": [{"pass": "kv-cache", "format": "int8"}],
    "fp8 cache, fp8 weights and inputs": [{"pass": "kv-cache"}, _FP8],
    "a mixture, int4 weights, groups": [_INT4],
    "a mixture, int8 weights and inputs": [_ROUNDED],
    "a mixture, fp8 weights and inputs": [_FP8],
    **{
        f"{kind} blocks of GGUF": [{"pass": "k-quants", "type": kind}]
        for kind in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
    },
    "iq4_xs blocks of GGUF": [{"pass": "k-quants", "type": "iq4_xs"}],
}


def save_model(scheme: str, folder: Path) -> Path:
    """Save a tiny decoder with random weights that the scheme is tried on. Its rows are whole blocks of GGUF, and its heads 64 wide."""
    mixture = scheme.startswith("a mixture")
    size = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 512}
    save_family("mixtral" if mixture else "llama", folder, vocab_size=400, dtype="bfloat16", **size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the sea was calm, and the ship came home"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<|end|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    torch.manual_seed(0)
    return folder
