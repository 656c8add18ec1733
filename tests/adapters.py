"""Trains adapters for tests: peft saves random values beside a tiny base."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.folders import load_tensors

PLAIN: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 12}


def train(
    base: Path, folder: Path, options: dict[str, Any] = PLAIN, *, tokens: int | None = None, seed: int = 1
) -> dict[str, Tensor]:
    """Save an adapter with random values beside its base. Returns the tensors of the model that peft makes of both."""
    import peft  # takes seconds, and most processes of the suite need it never

    header = inspect_model(FolderFiles(base))
    model = getattr(transformers, header.architecture).from_pretrained(base, dtype=torch.float32)
    if tokens is not None:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder, save_embedding_layers=True if tokens is not None else "auto")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder.with_name("merged"))
    return load_tensors(folder.with_name("merged"))
