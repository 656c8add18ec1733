"""Decoders in every export format, with their caches, run by their consumers; and the tokenizer in a GGUF file."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import gguf
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.export.onnx_codes import block_size
from nightpress.core.compress.export.program import usage_program
from nightpress.core.compress.export.verify import EXACT, HALVED
from nightpress.core.compress.model.cosines import whole_cosine
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.models import bert_tiny_dir
from tests.press import lay_out, press
from tests.usage import run_here, run_usage

TEXT = (
    "It is a truth universally acknowledged, that 1234 men in possession of a good fortune don't want naïve wives. "
    * 20
)


def byte_level_tokenizer(folder: Path) -> int:
    """Save a small tokenizer like GPT-2's. Returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|end|>", "eos_token": "<|end|>", "chat_template": "{{ messages }}"})
    )
    return int(tokenizer.get_vocab_size())


def save_llama(folder: Path, **changes: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    size = byte_level_tokenizer(folder)
    torch.manual_seed(0)
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": size,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**config | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def graphs(llama: Path, tmp_path_factory: pytest.TempPathFactory):
    """The job and the result of a Llama with 4-bit weights, exported to both graph formats."""
    recipe = {
        "passes": [{"pass": "weight-only", "bits": 4, "group_size": 32, "symmetric": False}],
        "exports": ["onnx", {"format": "onnx", "type": "fp16"}, "openvino"],
        "evaluate": [],
    }
    job = lay_out(tmp_path_factory.mktemp("graphs") / "job", llama, recipe)
    return job, press(job)


@pytest.mark.slow
def test_a_calibrated_decoder_answers_alike_in_every_runtime(graphs: Any):
    """Each artifact decodes with its cache, and is compared with the pressed model in torch."""
    _, (manifest, report, _) = graphs
    assert [artifact.format for artifact in manifest.artifacts] == ["onnx", "onnx-fp16", "openvino"]
    for artifact in report.artifacts:
        assert artifact.verification is not None
        # ONNX Runtime rounds activations to int8 before a product with packed weights. OpenVINO uses bf16 if the processor has it.
        assert artifact.verification.value > (0.998 if artifact.name == "openvino" else 0.995), artifact.name


@pytest.mark.slow
def test_the_programs_of_a_decoder_write_as_shown(graphs: Any):
    job, (_, report, _) = graphs
    for artifact in report.artifacts:
        assert run_usage(artifact, job / "out").strip(), artifact.name


@pytest.mark.slow
def test_the_codes_lie_in_the_graphs_as_codes(graphs: Any):
    import onnx

    job, _ = graphs
    model = onnx.load(job / "out" / "onnx" / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulNBits") == 14
    names = [value.name for value in model.graph.input]
    assert names[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert [value.name for value in model.graph.output][:2] == ["logits", "present.0.key"]
    sizes = [
        sum(file.size for file in artifact.files if file.path.startswith("model."))
        for artifact in graphs[1][0].artifacts
    ]
    assert sizes[1] < sizes[0]


@pytest.mark.slow
def test_a_float_decoder_passes_in_every_graph_runtime_whatever_arithmetic_it_chooses(tmp_path: Path):
    """OpenVINO computes in bfloat16 if the processor has instructions for it."""
    llama = save_llama(tmp_path / "model", num_hidden_layers=1)
    recipe = {"passes": [], "exports": ["onnx", "openvino"], "evaluate": []}
    _, report, _ = press(lay_out(tmp_path / "job", llama, recipe))
    bounds = {artifact.name: artifact.verification.bound for artifact in report.artifacts if artifact.verification}
    assert bounds == {"onnx": EXACT, "openvino": HALVED}


def test_the_widest_block_divides_the_group():
    assert [block_size(size) for size in (576, 128, 1024, 96, 48, 24, 100)] == [64, 128, 128, 32, 16, 0, 0]


# GGUF ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "qwen3", "gemma"])
def test_llama_cpp_computes_what_transformers_does(kind: str, llama_cpp: Any, llama: Path, tmp_path: Path):
    import torch
    import transformers

    folder = llama
    if kind == "llama3":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        folder = save_llama(
            tmp_path / "model",
            rope_parameters=rope | {"original_max_position_embeddings": 32},
            tie_word_embeddings=True,
        )
    elif kind != "llama":
        name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}[kind]
        folder = tmp_path / "model"
        folder.mkdir()
        config = getattr(transformers, f"{name}Config")(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16 if kind == "qwen2" else 32,
            intermediate_size=96,
            vocab_size=byte_level_tokenizer(folder),
            initializer_range=0.2,
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # in a new model, biases are zeros and norms are ones
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    header = inspect_model(FolderFiles(folder))
    gguf.save(folder, tmp_path / "out", header, weights="f32", pooling="mean")
    ids = list(range(5, 69))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    file = str(tmp_path / "out" / gguf.FILE_NAME)
    consumer = llama_cpp.Llama(file, n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    consumer.eval(ids)
    # llama.cpp keeps the cache in float16.
    assert whole_cosine(consumer.scores[:64], expected) > 0.99999
    consumer.close()


def test_a_file_carries_the_codes_the_tokenizer_and_the_template(llama_cpp: Any, llama: Path, tmp_path: Path):
    from gguf import GGUFReader
    from tokenizers import Tokenizer

    recipe = {
        "passes": [{"pass": "weight-only", "bits": 4, "group_size": 32}],
        "exports": [{"format": "gguf", "type": "q8_0"}],
        "evaluate": [
            {"metric": "perplexity", "samples": 2, "length": 32},
            {"metric": "generation-speed", "prompt": 40, "tokens": 4, "repeats": 3},
        ],
        "gates": {"size": "<= 40%"},
    }
    manifest, report, _ = press(lay_out(tmp_path / "job", llama, recipe))
    assert manifest.artifacts[0].format == "gguf-q8_0"
    assert manifest.artifacts[0].consumer.startswith("llama-cpp-python")
    assert {measurement.name for measurement in report.artifacts[0].measurements} >= {"perplexity", "kl_divergence"}
    assert report.artifacts[0].generation[0].decode_tokens_per_s > 0
    path = tmp_path / "job" / "out" / "gguf-q8_0" / "model.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    expected = Tokenizer.from_file(str(llama / "tokenizer.json")).encode(TEXT).ids
    assert model.tokenize(TEXT.encode(), add_bos=False, special=True) == expected
    assert model.metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert "create_chat_completion" in report.artifacts[0].usage
    run_here(report.artifacts[0].usage, path.parents[1])
    prompted = usage_program(
        "gguf", Path(path.parent.name), inspect_model(FolderFiles(llama))
    )  # a folder without the template
    assert "create_chat_completion" not in prompted
    run_here(prompted, path.parents[1])


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_a_bert_embeds_in_llama_cpp(pooling: str, llama_cpp: Any, tmp_path: Path):
    import torch
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=30522
    )
    config.initializer_range = 0.1
    BertModel(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (bert_tiny_dir() / name).exists():
            shutil.copy(bert_tiny_dir() / name, tmp_path / "model")
    module = {"path": "pool", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"}
    (tmp_path / "model" / "modules.json").write_text(json.dumps([module]))
    (tmp_path / "model" / "pool").mkdir()
    (tmp_path / "model" / "pool" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    recipe = {
        "passes": [],
        "exports": ["gguf", {"format": "gguf", "type": "q8_0"}],
        "evaluate": [{"metric": "fidelity", "samples": 4, "length": 32}],
    }
    _, report, _ = press(lay_out(tmp_path / "job", tmp_path / "model", recipe))
    cosines = [
        measurement.value
        for artifact in report.artifacts
        for measurement in artifact.measurements
        if measurement.name == "cosine"
    ]
    assert cosines[0] > 0.9999
    assert cosines[1] > 0.999
    header = inspect_model(FolderFiles(tmp_path / "model"))
    _, ours = run_here(usage_program("safetensors", tmp_path / "model", header), tmp_path)
    for artifact in report.artifacts:
        printed, theirs = run_here(artifact.usage, tmp_path / "job" / "out")
        assert printed.startswith("64 numbers:")
        assert whole_cosine(np.array(theirs["vector"]), ours["vector"]) > 0.999
    model = llama_cpp.Llama(str(tmp_path / "job" / "out" / "gguf" / "model.gguf"), vocab_only=True, verbose=False)
    expected = (
        Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    )
    assert model.tokenize(TEXT.encode(), add_bos=False, special=False) == expected


@pytest.mark.parametrize(
    ("place", "bytes_", "said"),
    [
        (b"GGUF\3", b"GGUF\x63", "written in GGUF version 99; .* reads up to GGUF version 3"),
        (b"llama", b"lhama", "unknown model architecture: 'lhama'"),
    ],
)
def test_why_llama_cpp_does_not_load_a_file_is_said(
    place: bytes, bytes_: bytes, said: str, llama_cpp: Any, llama: Path, tmp_path: Path
):
    header = inspect_model(FolderFiles(llama))
    recipe = parse_recipe({"name": "t", "passes": [], "exports": ["gguf"], "evaluate": []})
    trial = quality.prepare(recipe, header, llama, {}, threads=1)
    out = tmp_path / "gguf"
    gguf.save(llama, out, header, weights="f16", pooling="mean")
    file = out / gguf.FILE_NAME
    file.write_bytes(file.read_bytes().replace(place, bytes_, 1))
    with pytest.raises(NightpressError, match=said) as caught:
        run_consumer(gguf.CONSUMER, out, trial.task, name="gguf", scratch=tmp_path / "scratch")
    assert caught.value.code == ErrorCode.VERIFICATION_FAILED


def test_a_tensor_that_llama_cpp_does_not_know_is_said(llama: Path, tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.gate": np.zeros(4, np.float32)}, folder / "model.safetensors")
    header = inspect_model(FolderFiles(folder))
    with pytest.raises(NightpressError) as caught:
        gguf.save(folder, tmp_path / "out", header, weights="f16", pooling="mean")
    assert caught.value.code == ErrorCode.UNSUPPORTED_ARCHITECTURE
    assert "model.layers.0.gate" in caught.value.message


def test_what_no_format_can_carry_is_said_before_anything_runs():
    header = ModelHeader(model_type="ctrl", architecture="CTRLLMHeadModel", config={}, tensors=(), has_tokenizer=True)
    with pytest.raises(NightpressError) as caught:
        Export(format="gguf").check(header)
    assert caught.value.code == ErrorCode.INVALID_RECIPE
    assert "ctrl" in caught.value.message
    assert "onnx" in caught.value.hint
    Export(format="onnx").check(header)
