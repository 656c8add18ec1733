"""Calibration samples: how many there are, how long they are, which of their tokens are padding, and one of them by itself."""

from typing import Any

from torch import Tensor

from nightpress.core.compress.model.skeleton import Batch


def count_of(samples: Batch) -> int:
    """The number of samples."""
    return len(next(iter(samples.values())))


def tokens_a_sample(samples: Batch, config: Any) -> int:
    """The tokens of a text with its padding, or of an image. config: of transformers."""
    if "input_ids" in samples:
        return int(samples["input_ids"].shape[1])
    height, width = samples["pixel_values"].shape[-2:]
    rows, columns = _patch(config)
    return int(height // rows * (width // columns)) + 1


def split_mask(samples: Batch) -> tuple[Batch, Tensor | None]:
    """Return the samples and their mask as bool [samples, length]. If no sample is padded: the samples without masks, and None."""
    mask = samples.get("attention_mask")
    if mask is None:
        return samples, None
    if bool(mask.all()):
        return {name: tensor for name, tensor in samples.items() if not name.endswith("attention_mask")}, None
    return samples, mask.bool()


def alone(samples: Batch, real: Tensor | None, at: int) -> Batch:
    """The sample number `at` in a batch of its own: a text without its padding and its mask, or an image. real: as of `split_mask`."""
    given = {name: tensor[at : at + 1] for name, tensor in samples.items() if not name.endswith("attention_mask")}
    return given if real is None else {name: tensor[:, real[at]] for name, tensor in given.items()}


def _patch(config: Any) -> tuple[int, int]:
    """Pixels of a patch, from the config of the tower that sees. A model without patches counts as one with 16 × 16."""
    tower = getattr(config, "vision_config", config)
    size = getattr(tower, "patch_size", 16)
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)
