"""A quantized model in the formats of compressed-tensors, as transformers and vLLM read them."""

from pathlib import Path

from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.safetensors import CONSUMER
from nightpress.core.compress.model.quantization_config import CACHE_FILE, write_config

__all__ = ["CONSUMER", "save"]


def save(model_dir: Path, out_dir: Path) -> None:
    """Copy the finished model folder to `out_dir`."""
    safetensors.save(model_dir, out_dir)
    if (out_dir / CACHE_FILE).exists():  # it is still there if no pass after `kv-cache` has quantized weights
        write_config(out_dir, {}, kept=())
