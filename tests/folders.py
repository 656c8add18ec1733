"""Small model folders for tests of the passes, with any number of shards and any dtype."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nightpress.core.compress.model.checkpoint import INDEX_FILE, read_shards
from nightpress.core.recipes.header import ModelHeader


def header_of(folder: Path) -> ModelHeader:
    """The header that a registry would store for the folder."""
    config = json.loads((folder / "config.json").read_bytes())
    return ModelHeader(
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        config=config,
        tensors=tuple(tensor.info for shard in read_shards(folder) for tensor in shard.tensors),
        has_tokenizer=True,
    )


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def tiny_llama(folder: Path, *, dtype: torch.dtype = torch.bfloat16, shards: int = 1, **settings: Any) -> Path:
    """Save a Llama of 2 layers × 64 with transformers, divided into shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 256,
            "max_position_embeddings": 128,
            "dtype": dtype,
            **settings,
        }
    )
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():  # with its initial weights the model's outputs are nearly zero
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    if shards > 1:
        cut(folder, shards)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def cut(folder: Path, shards: int) -> None:
    """Replace model.safetensors by this number of files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        part = names[number::shards]
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
