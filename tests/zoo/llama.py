"""Writes a tiny model as GGUF, loads it into llama.cpp, and compares its answers with those of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from nightpress.core.compress.export import gguf
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Recipe
from nightpress.core.recipes.plan import make_plan
from tests.models import save_smollm_tokenizer
from tests.zoo.configs import shrunk
from tests.zoo.models import config_for, load

#: Shapes that llama.cpp's graph of a family was written for, and that its smallest config hasn't.
SHAPES: dict[str, dict[str, Any]] = {
    "cohere2": {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "exaone4": {"sliding_window": None, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "mistral": {"sliding_window": None},
}
#: Tokens by whose names the converter finds the end of a text.
_NAMED = {"glm": ("<|user|>", "<|observation|>"), "glm4": ("<|user|>", "<|observation|>")}
_WORDS = 49152 + 8  #: SmolLM2's tokens, and a few more


def save_with_known_tokenizer(model_type: str, class_name: str, folder: Path) -> Path:
    """Save a tiny model with random weights and SmolLM2's tokenizer: the converter takes none that it doesn't know."""
    model_class = getattr(transformers, class_name)
    shapes = SHAPES.get(model_type)
    config = config_for(model_type, model_class) if shapes is None else shrunk(model_class.config_class, **shapes)
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = _WORDS, 2, 1, 2
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too: as ones and zeros they would hide errors
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_smollm_tokenizer(folder)
    if model_type in _NAMED:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(_NAMED[model_type])})
        tokenizer.save_pretrained(folder)
    return folder


def llama_cpp_distance(model_type: str, class_name: str, work: Path, recipe: Recipe) -> float:
    """The relative distance of llama.cpp's logits from those of transformers, for a model in f32. Raises ImportError without llama.cpp."""
    import llama_cpp

    folder = save_with_known_tokenizer(model_type, class_name, work / "known")
    header = inspect_model(FolderFiles(folder))
    make_plan(recipe, header)
    gguf.save(folder, work / "out", header, weights="f32", pooling=header.pooling)
    ids = torch.randint(5, 40000, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    consumer = llama_cpp.Llama(str(work / "out" / gguf.FILE_NAME), n_ctx=64, logits_all=True, verbose=False)
    consumer.eval(ids)
    found = np.array(consumer.scores[: len(ids)])
    consumer.close()
    with torch.inference_mode():
        expected = load(class_name, folder)(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return float(np.linalg.norm(found[:, : expected.shape[1]] - expected) / np.linalg.norm(expected))
