"""Saves a tiny model of any class of transformers, with a tokenizer of single letters, and runs it."""

import inspect
import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from tests.zoo.configs import tiny_config

LARGEST = 4_000_000  #: weights of a model that counts as tiny


def config_for(model_type: str, model_class: Any) -> Any:
    """Return a small config that the class takes: of this type, or of the part of it that the class is."""
    wanted = model_class.config_class
    if transformers.CONFIG_MAPPING[model_type] is wanted or wanted is None:
        return tiny_config(model_type)
    config = tiny_config(model_type)
    text = config.get_text_config()
    return text if isinstance(text, wanted) else tiny_config(wanted.model_type)


def save_tiny(model_type: str, class_name: str, folder: Path, **changes: Any) -> Path:
    """Save a model of this class with random weights. Its norms and biases are random, too: as ones and zeros they would hide errors.

    changes: values of its config.
    """
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    config = config_for(model_type, model_class)
    config.update(changes)
    if "SequenceClassification" in class_name and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0  # a decoder's classifier finds a text's end by it
    model = model_class(config)
    if (count := sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
        raise ValueError(f"its smallest form has {count:,} weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and "A_log" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    letters = {
        token: at for at, token in enumerate(["[PAD]", "[BOS]", "</s>", "[UNK]", "[MASK]", *string.ascii_letters])
    }
    tokenizer = Tokenizer(models.WordLevel(letters, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"pad_token": "[PAD]", "eos_token": "</s>", "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def load(class_name: str, folder: Path) -> Any:
    return getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Two random texts, images or sounds."""
    random = torch.Generator().manual_seed(1)
    if getattr(model, "main_input_name", "input_ids") == "input_features":
        frames = torch.randn(2, model.config.num_mel_bins, 2 * model.config.max_source_positions, generator=random)
        return {"input_features": frames, "decoder_input_ids": torch.randint(5, 50, (2, 8), generator=random)}
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {
            "pixel_values": torch.randn(2, getattr(model.config, "num_channels", 3), height, width, generator=random)
        }
    ids = torch.randint(5, 50, (2, 32), generator=random)
    if model.config.is_encoder_decoder and "SequenceClassification" in type(model).__name__:
        ids[:, -1] = model.config.eos_token_id
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def answers(model: Any) -> Tensor:
    """The first output of a model for `inputs_of` it."""
    torch.manual_seed(0)  # some models draw numbers as they run
    alone = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        out: Tensor = model(**inputs_of(model), **alone)[0]
    return out.float()
