"""`k-quants` from a model's folder to a file that llama.cpp runs."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, quants

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.export import gguf
from nightpress.core.compress.export.gguf.families import GgufFamily
from nightpress.core.compress.grids.gguf_ranges import round_to_blocks
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.compress.solvers.ggml import GgmlQuantizer
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.gguf_types import GGUF_TYPES
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import KQuants
from nightpress.core.recipes.plan import make_plan
from tests.integration.test_decoder_exports import save_llama
from tests.press import lay_out, press


def _press(source: Path, work: Path, **options: Any) -> tuple[Path, PassRecord]:
    recipe = parse_recipe({"name": "r", "passes": [{"pass": "k-quants", **options}], "exports": ["gguf"]})
    header = inspect_model(FolderFiles(source))
    recipe.passes[0].check(header)
    context = PassContext(header=header, work_dir=work / "work", calibration=Calibration(samples=8, length=48))
    (work / "work").mkdir(parents=True)
    return work / "out", MODEL_PASSES["k-quants"](source, work / "out", recipe.passes[0], context)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and of 512 weights, and a table with rows of 256."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": True}
    return save_llama(tmp_path_factory.mktemp("k-quants") / "model", **shape)


@pytest.fixture(scope="module")
def chosen(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PassRecord]:
    return _press(llama, tmp_path_factory.mktemp("chosen"), bits_per_weight=4.25)


@pytest.mark.slow
def test_a_file_holds_exactly_the_numbers_of_the_pass(llama: Path, chosen: tuple[Path, PassRecord], tmp_path: Path):
    folder, _ = chosen
    header = inspect_model(FolderFiles(llama))
    gguf.save(folder, tmp_path / "out", header, weights="f16", pooling="mean")
    reader = GGUFReader(tmp_path / "out" / gguf.FILE_NAME)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = PressedWeights(folder)
    for name, part in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj"), ("ffn_gate", "mlp.gate_proj")):
        found = tensors[f"blk.1.{name}.weight"]
        meant = weights.floats(f"model.layers.1.{part}.weight")
        np.testing.assert_array_equal(quants.dequantize(found.data, found.tensor_type), meant)
    queries, name = tensors["blk.1.attn_q.weight"], "model.layers.1.self_attn.q_proj.weight"
    order = GgufFamily(header).row_order(name)
    assert order is not None
    np.testing.assert_array_equal(quants.dequantize(queries.data, queries.tensor_type), weights.floats(name)[order])
    field = reader.get_field("general.file_type")
    assert field is not None
    assert LlamaFileType(field.contents()).name.startswith("MOSTLY_Q")
    assert tensors["token_embd.weight"].tensor_type.name == "Q6_K"
    assert all(tensor.tensor_type.name == "F32" for tensor in tensors.values() if len(tensor.shape) == 1)


def test_a_mean_of_bits_is_kept_and_told(chosen: tuple[Path, PassRecord], llama: Path):
    _, record = chosen
    types = record.summary["type_by_layer"]
    assert len(set(types.values())) > 1
    assert 4.1 < record.summary["bits_per_weight"] <= 4.25
    assert record.summary["error_by_layer"].keys() == types.keys()
    header = inspect_model(FolderFiles(llama))
    with pytest.raises(NightpressError, match=r"2\.2 bits a weight is less than the smallest types take"):
        KQuants(bits_per_weight=2.2).check(header)
    with pytest.raises(ValueError, match="name one of them"):
        KQuants(bits_per_weight=4.0, type="q5_k")
    mean = KQuants(bits_per_weight=4.0)
    assert KQuants.model_validate(mean.model_dump()) == mean, "a stored recipe can be read again"


def test_more_bits_lose_less(llama: Path, chosen: tuple[Path, PassRecord]):
    """The measured errors of each layer fall from type to type."""
    _, record = chosen
    for errors in record.summary["error_by_layer"].values():
        assert list(errors.values()) == sorted(errors.values(), reverse=True)


@pytest.mark.slow
def test_with_real_inputs_it_loses_less_than_the_nearest_codes_of_the_same_grid(minilm: Path, tmp_path: Path):
    """The feed-forward layers of a real encoder: the outputs' error on text that calibrated nothing."""
    from transformers import AutoModel, AutoTokenizer

    folder, record = _press(
        minilm, tmp_path, type="q3_k", ignore=["re:.*embed.*", "re:.*pooler.*", "re:.*layer.[1-5].*"]
    )
    tokens = AutoTokenizer.from_pretrained(minilm)(
        ["The ship sailed before dawn.", "Rates of interest fell in March.", "A recipe for lentil soup with lemon."],
        return_tensors="pt",
        padding=True,
    )
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    weights, layers = PressedWeights(folder), dict(model.named_modules())
    assert weights.block_type("encoder.layer.0.output.dense.weight") is not None
    lost = {"solved": 0.0, "nearest": 0.0}
    for name in ("encoder.layer.0.output.dense", "encoder.layer.0.intermediate.dense"):
        seen: list[torch.Tensor] = []
        hook = layers[name].register_forward_pre_hook(lambda _layer, inputs, seen=seen: seen.append(inputs[0]))
        with torch.inference_mode():
            model(**tokens)
        hook.remove()
        inputs = seen[0][tokens["attention_mask"].bool()].clone()
        exact = layers[name].weight.detach()
        kind = weights.block_type(f"{name}.weight")
        assert kind is not None
        rounded = {
            "solved": torch.from_numpy(weights.floats(f"{name}.weight")),
            "nearest": round_to_blocks(exact, kind).dequantize(),
        }
        for method, weight in rounded.items():
            lost[method] += float(((weight - exact) @ inputs.T).square().sum() / (exact @ inputs.T).square().sum())
    assert lost["solved"] < 0.8 * lost["nearest"]
    assert {layer.name for layer in record.layers} >= {"encoder.layer.0.output.dense"}


#: Type → the weighted relative squared error of normal weights
UNEVEN = {"iq3_s": 0.0625, "iq4_nl": 0.0156, "iq4_xs": 0.0156, "tq2_0": 0.7, "mxfp4": 0.03}


@pytest.mark.parametrize("name", UNEVEN)
def test_ggml_rounds_to_uneven_grids_with_our_importance(name: str):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    kind, random = GGUF_TYPES[name], torch.Generator().manual_seed(0)
    weight = torch.randn(16, 512, generator=random) * 0.02
    importance = torch.randn(512, generator=random).mul(2).exp()

    def lost(blocks: torch.Tensor) -> float:
        back = torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[name.upper()]))
        return float(((back - weight).square() * importance).sum() / (weight.square() * importance).sum())

    with GgmlQuantizer(3) as ggml:
        weighted, plain = (ggml.blocks(weight, kind, power) for power in (importance, torch.ones(512)))
    assert lost(weighted) < UNEVEN[name]
    if name.startswith("iq"):
        assert lost(weighted) < lost(plain)


def test_the_number_of_threads_changes_no_byte():
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    weight = torch.randn(17, 256, generator=torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 3):
        with GgmlQuantizer(threads) as ggml:
            found.append(ggml.blocks(weight, GGUF_TYPES["iq4_xs"], torch.ones(256)))
    assert torch.equal(*found)


def test_a_mean_of_bits_may_choose_uneven_grids(llama: Path, tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    folder, record = _press(llama, tmp_path, bits_per_weight=4.9, candidates=["iq4_xs", "q5_k", "q6_k"])
    types = record.summary["type_by_layer"]
    assert "iq4_xs" in types.values()
    weights, source = PressedWeights(folder), SourceTensors(read_shards(llama))
    for layer in record.layers:
        name = f"{layer.name}.weight"
        exact, found = source.read(name).float().numpy(), weights.floats(name)
        assert np.linalg.norm(found - exact) / np.linalg.norm(exact) == pytest.approx(layer.relative_error, rel=1e-3)


def test_without_llama_cpp_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", sys._base_executable)  # type: ignore[attr-defined]
    with GgmlQuantizer(1) as ggml, pytest.raises(NightpressError, match="not installed here") as caught:
        ggml.blocks(torch.ones(1, 256), GGUF_TYPES["iq3_s"], torch.ones(256))
    assert "nightpress[llama]" in caught.value.hint


@pytest.mark.slow
def test_a_killed_pass_goes_on_to_the_same_bytes(llama: Path, chosen: tuple[Path, PassRecord], tmp_path: Path):
    folder, _ = chosen
    recipe = parse_recipe({"name": "r", "passes": [{"pass": "k-quants", "bits_per_weight": 4.25}], "exports": ["gguf"]})
    (tmp_path / "work").mkdir()
    written: list[Path] = []

    def killed(path: Path, _step: int) -> None:
        written.append(path)
        if len(written) == 2:  # the sweep's result, then the first block's shard
            raise KeyboardInterrupt

    header = inspect_model(FolderFiles(llama))
    context = PassContext(
        header=header,
        work_dir=tmp_path / "work",
        calibration=Calibration(samples=8, length=48),
        checkpoint=killed,
    )
    with pytest.raises(KeyboardInterrupt):
        MODEL_PASSES["k-quants"](llama, tmp_path / "out", recipe.passes[0], context)
    MODEL_PASSES["k-quants"](llama, tmp_path / "out", recipe.passes[0], context)
    ours, theirs = (SourceTensors(read_shards(at)) for at in (tmp_path / "out", folder))
    assert list(ours.names()) == list(theirs.names())
    for name in theirs.names():
        assert torch.equal(ours.read(name), theirs.read(name)), name


def test_a_job_ends_with_a_file_that_llama_cpp_answers_from(llama: Path, tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    recipe = {
        "passes": [{"pass": "k-quants", "type": "q5_k"}],
        "calibration": {"samples": 8, "length": 48},
        "exports": ["gguf"],
        "evaluate": [{"metric": "perplexity", "samples": 2, "length": 32}],
    }
    plan = make_plan(parse_recipe({"name": "r", **recipe}), inspect_model(FolderFiles(llama)))
    _, report, _ = press(lay_out(tmp_path / "job", llama, recipe))
    (artifact,) = report.artifacts
    assert artifact.verification is not None
    assert artifact.verification.value > 0.95
    size = (tmp_path / "job" / "out" / "gguf" / "model.gguf").stat().st_size
    assert plan.estimate is not None
    assert plan.estimate.output_bytes["gguf"] == pytest.approx(size, rel=0.1)
