"""Easily missed differences between a GGUF file and its model: ignored config keys, stored heads of tied models, tokenization."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import compressed_tensors, gguf
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.export.verify import verify
from nightpress.core.compress.model.cosines import whole_cosine
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.integration.test_decoder_exports import byte_level_tokenizer
from tests.press import lay_out, press

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "bert": "BertModel",
}
_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_DECODERS = [kind for kind in _CLASSES if kind != "bert"]

#: (family, config): a GGUF file or llama.cpp's graph can represent these
SAME = [
    *((kind, {"rms_norm_eps": 0.1}) for kind in _DECODERS),
    *((kind, {"rope_parameters": _LINEAR}) for kind in _DECODERS),
    *((kind, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}) for kind in _DECODERS),
    *((kind, {"tie_word_embeddings": True}) for kind in _DECODERS),
    *((kind, {"rope_parameters": _LLAMA3}) for kind in ("llama", "mistral")),
    *((kind, {"head_dim": 32}) for kind in ("llama", "mistral", "qwen3", "gemma")),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 128}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    ("gemma", {"hidden_act": "gelu"}),
    ("bert", {"hidden_act": "gelu_new"}),
    ("bert", {"layer_norm_eps": 0.1}),
]
#: (family, config, error's text): llama.cpp ignores these
OTHERWISE = [
    *((kind, {"hidden_act": "relu"}, "`hidden_act`") for kind in _CLASSES),
    *((kind, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'") for kind in _DECODERS),
    *((kind, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'") for kind in _DECODERS),
    *((kind, {"rope_scaling": {"type": "longrope"}}, "'longrope'") for kind in _DECODERS),
    *((kind, {"rope_parameters": _LLAMA3}, "'llama3'") for kind in ("qwen2", "qwen3", "gemma")),
    *(
        (kind, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor")
        for kind in _DECODERS
    ),
    *((kind, {"attention_bias": True}, "`attention_bias`") for kind in ("qwen3", "gemma")),
    ("gemma", {"tie_word_embeddings": False}, "`tie_word_embeddings`"),
    ("mistral", {"sliding_window": 8}, "`sliding_window` 8"),
    *(
        (kind, {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, "sliding")
        for kind in ("qwen2", "qwen3")
    ),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
    ("qwen2", {"head_dim": 32}, "share the hidden size"),
    ("bert", {"is_decoder": True}, "`is_decoder`"),
    ("bert", {"position_embedding_type": "relative_key"}, "`position_embedding_type`"),
    ("bert", {"type_vocab_size": 0}, "`type_vocab_size`"),
]


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")


def _save(kind: str, folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    size = byte_level_tokenizer(folder) if kind != "bert" else wordpiece(folder)
    model_class = getattr(transformers, _CLASSES[kind])
    grouped = {} if kind == "bert" else {"num_key_value_heads": 2}
    if kind in {"gemma", "qwen3"}:
        grouped["head_dim"] = 16
    if kind == "mistral":
        grouped["sliding_window"] = None  # type: ignore[assignment]
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**_SHAPE | grouped | {"vocab_size": size} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # in a new model, biases are zeros and norms are ones
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def wordpiece(folder: Path, **normalizer: Any) -> int:
    """Save BERT's tokenizer with letters in both cases, with and without accents. Returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [*map(chr, range(33, 127)), *"éïöüçÅåàäñ你好，世界。我喜欢模型压缩東京タワへようこそ…"]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{letter}" for letter in letters),
        "quick",
        "Quick",
        "café",
    ]
    vocabulary = {fromkey: at for at, fromkey in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return len(vocabulary)


def _header(kind: str, **config: Any) -> ModelHeader:
    known = {"vocab_size": 256, **_SHAPE} | config
    if kind == "mistral":
        known.setdefault("sliding_window", None)
    return ModelHeader(model_type=kind, architecture=_CLASSES[kind], config=known, tensors=(), has_tokenizer=True)


def _logits(llama_cpp: Any, file: Path, ids: list[int]) -> Any:
    consumer = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    consumer.eval(ids)
    found = np.array(consumer.scores[: len(ids)])
    consumer.close()
    return found


def _torch_logits(folder: Path, ids: list[int]) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize(("kind", "changes"), SAME, ids=str)
def test_keys_that_a_file_stands_for_change_both_alike(
    kind: str, changes: dict[str, Any], llama_cpp: Any, tmp_path: Path
):
    folder = _save(kind, tmp_path / "model", **changes)
    header = inspect_model(FolderFiles(folder))
    Export(format="gguf").check(header)
    if kind == "bert":
        _, report, _ = press(lay_out(tmp_path / "job", folder, {"passes": [], "exports": ["gguf"], "evaluate": []}))
        assert report.artifacts[0].verification is not None
        assert report.artifacts[0].verification.value > 0.999
        return
    gguf.save(folder, tmp_path / "out", header, weights="f32", pooling="mean")
    ids = list(range(5, 55))
    found = _logits(llama_cpp, tmp_path / "out" / gguf.FILE_NAME, ids)
    assert whole_cosine(found, _torch_logits(folder, ids)) > 0.9999


@pytest.mark.parametrize(("kind", "config", "why"), OTHERWISE, ids=str)
def test_keys_that_llama_cpp_passes_over_are_refused_when_planned(kind: str, config: dict[str, Any], why: str):
    Export(format="gguf").check(_header(kind))
    with pytest.raises(NightpressError, match=why) as caught:
        Export(format="gguf").check(_header(kind, **config))
    assert caught.value.code == ErrorCode.INVALID_RECIPE


def _with_own_head(folder: Path) -> Path:
    """Store a head that differs from the embeddings, although config.json ties the two. transformers then uses the stored head."""
    tensors = load_file(folder / "model.safetensors")
    head = np.random.default_rng(0).normal(0, 0.2, tensors["model.embed_tokens.weight"].shape).astype(np.float32)
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_stored_head_beside_a_tie_is_the_head(kind: str, llama_cpp: Any, tmp_path: Path):
    folder = _with_own_head(_save(kind, tmp_path / "model", tie_word_embeddings=True))
    gguf.save(folder, tmp_path / "out", inspect_model(FolderFiles(folder)), weights="f32", pooling="mean")
    ids = list(range(5, 55))
    found = _logits(llama_cpp, tmp_path / "out" / gguf.FILE_NAME, ids)
    assert whole_cosine(found, _torch_logits(folder, ids)) > 0.9999


def test_a_copy_of_the_table_is_not_written_twice_and_another_head_is(tmp_path: Path):
    from gguf import GGUFReader

    folder = _save("llama", tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    copy = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    save_file(copy, folder / "model.safetensors", metadata={"format": "pt"})
    header = inspect_model(FolderFiles(folder))
    gguf.save(folder, tmp_path / "a", header, weights="f32", pooling="mean")
    _with_own_head(folder)
    gguf.save(folder, tmp_path / "b", header, weights="f32", pooling="mean")
    heads = [
        "output.weight" in [tensor.name for tensor in GGUFReader(tmp_path / at / gguf.FILE_NAME).tensors] for at in "ab"
    ]
    assert heads == [False, True]


def test_a_gemma_with_a_head_of_its_own_is_refused(tmp_path: Path):
    folder = _with_own_head(_save("gemma", tmp_path / "model"))
    with pytest.raises(NightpressError, match="multiplies by the table of embeddings") as caught:
        gguf.save(folder, tmp_path / "out", inspect_model(FolderFiles(folder)), weights="f32", pooling="mean")
    assert caught.value.code == ErrorCode.UNSUPPORTED_ARCHITECTURE


NORMALIZERS = [
    {"lowercase": True},
    {"lowercase": False},
    {"lowercase": True, "strip_accents": False},
    {"lowercase": False, "strip_accents": True},
]


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_case_and_accents_are_kept_as_the_tokenizer_keeps_them(
    normalizer: dict[str, Any], llama_cpp: Any, tmp_path: Path
):
    folder = _save("bert", tmp_path / "model")
    wordpiece(folder, **normalizer)
    gguf.save(folder, tmp_path / "out", inspect_model(FolderFiles(folder)), weights="f16", pooling="mean")
    gguf.check_tokens(folder, tmp_path / "out", name="gguf", scratch=tmp_path)


def test_a_file_that_cuts_text_otherwise_is_found_out(llama_cpp: Any, tmp_path: Path):
    """Only the tokenizer differs: the weights, and the outputs for token ids, are right."""
    folder = _save("bert", tmp_path / "model")
    gguf.save(folder, tmp_path / "out", inspect_model(FolderFiles(folder)), weights="f16", pooling="mean")
    wordpiece(folder, lowercase=False)
    with pytest.raises(NightpressError, match=r"cuts 'The Quick BROWN Fox.* into other tokens") as caught:
        gguf.check_tokens(folder, tmp_path / "out", name="gguf", scratch=tmp_path)
    assert caught.value.code == ErrorCode.VERIFICATION_FAILED


@pytest.mark.parametrize("kind", _CLASSES)
def test_the_matrices_of_every_family_are_read_back(kind: str, tmp_path: Path):
    folder = _save(kind, tmp_path / "model")
    header = inspect_model(FolderFiles(folder))
    gguf.save(folder, tmp_path / "out", header, weights="q8_0", pooling="mean")
    found = gguf.compare_layers(folder, tmp_path / "out", header)
    assert found.layers >= 2 * 6, "two blocks"
    assert found.error < found.bound / 2, found


@pytest.mark.parametrize("normalizer", [{"clean_text": False}, {"handle_chinese_chars": False}], ids=str)
def test_text_that_llama_cpp_can_not_clean_alike_is_refused(normalizer: dict[str, Any], tmp_path: Path):
    folder = _save("bert", tmp_path / "model")
    wordpiece(folder, **normalizer)
    with pytest.raises(NightpressError, match="no tokenizer like this model's") as caught:
        gguf.save(folder, tmp_path / "out", inspect_model(FolderFiles(folder)), weights="f16", pooling="mean")
    assert caught.value.code == ErrorCode.UNSUPPORTED_ARCHITECTURE


def test_what_llama_cpp_reads_otherwise_is_noted(llama_cpp: Any, minilm: Path, tmp_path: Path):
    _, report, _ = press(lay_out(tmp_path / "job", minilm, {"passes": [], "exports": ["gguf"], "evaluate": []}))
    assert any("Korean" in note for note in report.artifacts[0].notes)


def _exchange_queries_and_keys(tensors: dict[str, Any]) -> None:
    name, other = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk")
    tensors[name], tensors[other] = tensors[other], tensors[name]


def _transpose_a_matrix(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["f16", "q8_0"])
def test_a_broken_file_is_refused(weights: str, llama_cpp: Any, tmp_path: Path):
    """A missing file, half a file, and files with a wrong matrix each. The whole file passes."""
    source = _save("llama", tmp_path / "source", num_key_value_heads=4)
    export = {"format": "gguf", "type": weights}
    recipe = parse_recipe({"name": "t", "passes": [], "exports": [export], "evaluate": []})
    header = inspect_model(FolderFiles(source))
    task = quality.prepare(recipe, header, source, {}, threads=1).task
    scratch = tmp_path / "scratch"
    theirs = run_consumer(compressed_tensors.CONSUMER, source, task, name="source", scratch=scratch)

    def judge(folder: Path) -> None:
        seen = run_consumer(gguf.CONSUMER, folder, task, name="gguf", scratch=scratch)
        verify(recipe, recipe.exports[0], seen, source=theirs, traced=None, task=task)

    def saved(model: Path, name: str) -> Path:
        gguf.save(model, tmp_path / name, header, weights=weights, pooling="mean")
        return tmp_path / name

    judge(saved(source, "whole"))
    for change in (_exchange_queries_and_keys, _transpose_a_matrix):
        model = tmp_path / f"model{change.__name__}"
        shutil.copytree(source, model)
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(NightpressError) as refused:
            judge(saved(model, change.__name__))
        assert refused.value.code == ErrorCode.VERIFICATION_FAILED, change.__name__
    cut = saved(source, "cut") / gguf.FILE_NAME
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tmp_path / "empty").mkdir()
    for folder in (cut.parent, tmp_path / "empty"):
        with pytest.raises(NightpressError) as refused:
            judge(folder)
        assert refused.value.code == ErrorCode.VERIFICATION_FAILED, folder.name
