"""What a GGUF file says besides its tensors: tokenizer, chat templates, name and licence, as llama.cpp's converter writes them."""

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFReader

from nightpress.core.compress.data.tokenized import open_tokenizer
from nightpress.core.compress.export import gguf
from nightpress.core.compress.export.gguf import converted, tokens
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.llama_cpp import DECODERS
from tests.integration.test_decoder_exports import save_llama
from tests.models import save_smollm_tokenizer

#: Keys in which we differ from the converter on purpose
_OURS = {
    "general.name",  # it takes the folder's name
    "tokenizer.ggml.add_eos_token",  # we say it in any case
    "tokenizer.ggml.pre",  # it goes by the tokens of one text, which more than one splitting gives for this vocabulary
    "general.file_type",
}
_CARD = """---
license: apache-2.0
base_model: someone/Some-Model-1B
language: [en, de]
---
# A model
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the tokenizer of SmolLM2."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, vocab_size=49152, pad_token_id=2)  # type: ignore[arg-type]
    ).save_pretrained(folder)
    save_smollm_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer of 400 tokens: the keys of a file with 49,152 take seconds to read."""
    return save_llama(tmp_path_factory.mktemp("model") / "small", num_hidden_layers=1)


def _save(model: Path, out: Path) -> Path:
    gguf.save(model, out, inspect_model(FolderFiles(model)), weights="f16", pooling="mean")
    return out / gguf.FILE_NAME


def _keys(file: Path) -> dict[str, Any]:
    found = GGUFReader(file).fields.items()
    return {key: field.contents() for key, field in found if not key.startswith("GGUF.")}


def _texts() -> list[str]:
    """Manuals, code, and runs of 64 characters from all scripts of the Basic Multilingual Plane and of emoji."""
    blocks = [*range(0x20, 0xD7C0, 64), *range(0xE000, 0xFFC0, 64), *range(0x1F300, 0x1FA00, 64)]
    scripts = ["".join(map(chr, range(first, first + 64))) for first in blocks]
    code = [path.read_text() for path in sorted(Path(__file__).parent.glob("test_gguf*.py"))]
    spaces = [first * n + "a" + second * n for first in " \t\n" for second in " \n\r\t" for n in range(1, 6)]
    return [*tokens.TEXTS, *topics.values(), *scripts, *code, *spaces]


@pytest.mark.slow
def test_many_texts_have_equal_tokens(model: Path, tmp_path: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    reader = llama_cpp.Llama(str(_save(model, tmp_path / "out")), vocab_only=True, verbose=False)
    ours = open_tokenizer(model)
    chat = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    for text in [*_texts(), chat]:
        assert reader.tokenize(text.encode(), add_bos=True, special=True) == ours.encode(text, special=True), text


@pytest.mark.slow
def test_the_keys_are_those_of_llama_cpps_converter(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if not (converted.CONVERTER / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's converter is not installed: make llama")
    assert "llama" in DECODERS
    (model / "README.md").write_text(_CARD)
    ours = _keys(_save(model, tmp_path / "ours"))
    header = inspect_model(FolderFiles(model))
    theirs = tmp_path / "theirs" / gguf.FILE_NAME
    converted.convert(model, theirs, header, 1, weights="f16")  # type: ignore[arg-type]
    found = _keys(theirs)
    assert {key: ours.get(key) for key in found if key not in _OURS} == {
        key: value for key, value in found.items() if key not in _OURS
    }
    assert ours.keys() - found.keys() <= _OURS


def test_the_card_and_the_sampling_are_in_the_file(small: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    (folder / "README.md").write_text(_CARD)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 20, "top_p": "high"}))
    found = _keys(_save(folder, tmp_path / "out"))
    assert found["general.license"] == "apache-2.0"
    assert found["general.languages"] == ["en", "de"]
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/someone/Some-Model-1B"
    assert found["general.size_label"] == "74K"
    assert found["general.name"] == "Llama 74K"
    assert found["general.sampling.temp"] == 0.5
    assert found["general.sampling.top_k"] == 20
    assert "general.sampling.top_p" not in found


def test_merges_keep_their_spaces(small: Path, tmp_path: Path):
    """A part of a merge may be a space itself. The file separates parts by spaces, so a space in a part is its byte's letter."""
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    raw = json.loads((folder / "tokenizer.json").read_bytes())
    last = max(raw["model"]["vocab"].values())
    raw["model"]["vocab"] |= {" ": last - 1, " a": last}
    raw["model"]["merges"] = [[" ", "a"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert _keys(_save(folder, tmp_path / "out"))["tokenizer.ggml.merges"] == ["Ġ a"]


def test_several_chat_templates_are_kept(small: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|end|>", "eos_token": "<|end|>"}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    found = _keys(_save(folder, tmp_path / "out"))
    assert found["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    assert found["tokenizer.chat_template.tools"] == "{{ tools }}"
