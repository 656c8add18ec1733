"""Exports run by their consumers: correct ones pass the verification, broken and wrong ones fail it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import onnx, openvino, safetensors
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.export.verify import EXACT, HALVED, verify
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.graph.dynamic_int8 import codes_of, fold_transposes, quantize_onnx, sensitive_layers
from nightpress.core.compress.passes import PassContext
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.processor import bfloat16_held_down
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import DynamicInt8
from nightpress.core.recipes.plan import make_plan
from tests.models import bert_tiny_dir
from tests.press import lay_out, press

FLOAT = {"name": "t", "passes": [{"pass": "magnitude"}], "exports": ["onnx", "openvino"], "evaluate": []}


class Bench:
    """BERT-tiny traced once, without any pass."""

    def __init__(self, folder: Path) -> None:
        self.model = bert_tiny_dir(folder)
        self.header = inspect_model(FolderFiles(self.model))
        self.recipe = parse_recipe(FLOAT)
        self.trial = quality.prepare(self.recipe, self.header, self.model, {}, threads=1)
        self.context = PassContext(header=self.header, work_dir=folder / "work")
        self.checkpoints: list[str] = []
        context = replace(self.context, checkpoint=lambda path, _step: self.checkpoints.append(path))
        self.traced = tracing.trace(self.model, self.header, self.trial.task.sets[0].sequences, context)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("export", [onnx, openvino])
@pytest.mark.slow
def test_a_float_graph_answers_as_the_model_does(bench: Bench, tmp_path: Path, export: Any):
    out = tmp_path / "out" / export.__name__.rsplit(".", 1)[-1]
    out.parent.mkdir()
    assert export.save(bench.model, out, bench.traced, []) == ()
    observed = run_consumer(export.CONSUMER, out, bench.trial.task, name="it", scratch=tmp_path / "scratch")
    judged = verify(
        bench.recipe, Export(format=out.name), observed, source=observed, traced=bench.traced, task=bench.trial.task
    )
    assert judged.value >= judged.bound == (HALVED if export is openvino else EXACT)


@pytest.mark.slow
def test_onnx_runtime_joins_no_sum_with_a_norm(bench: Bench, tmp_path: Path):
    """Its SkipLayerNormalization takes several times as long as both."""
    import onnx as library
    import onnxruntime

    onnx.save(bench.model, tmp_path / "out", bench.traced, [])

    def operations(graph: Path) -> set[str]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that the graph it writes suits this machine alone
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return {node.op_type for node in library.load(options.optimized_model_filepath).graph.node}

    assert "SkipLayerNormalization" in operations(bench.traced.path)
    found = operations(tmp_path / "out" / "model.onnx")
    assert "LayerNormalization" in found
    assert "SkipLayerNormalization" not in found


@pytest.mark.slow
def test_openvino_computes_in_float32_where_the_processor_is_told_to_do_without_bfloat16(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """OpenVINO would choose bfloat16 by the real processor, and then find no kernel that ONEDNN_MAX_CPU_ISA allows."""
    out = tmp_path / "out" / "openvino"
    out.parent.mkdir()
    openvino.save(bench.model, out, bench.traced, [])
    answers = []
    for isa in ("DEFAULT", "AVX2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        observed = run_consumer(openvino.CONSUMER, out, bench.trial.task, name=isa, scratch=tmp_path / "scratch")
        assert ("f32" in observed.snippet) == bfloat16_held_down()
        answers.append(observed.outputs)
    for key, value in answers[0].items():
        np.testing.assert_allclose(answers[1][key], value, atol=0.1 * np.abs(value).max())


@pytest.mark.slow
def test_the_trace_is_kept_for_the_next_attempt(bench: Bench):
    before = bench.traced.path.stat().st_mtime_ns
    again = tracing.trace(bench.model, bench.header, bench.trial.task.sets[0].sequences, bench.context)
    assert again.path.stat().st_mtime_ns == before
    assert again.path.relative_to(bench.context.work_dir).as_posix() in bench.checkpoints
    assert len(bench.checkpoints) == len(set(bench.checkpoints)), "nothing was made again"


@pytest.mark.slow
def test_an_artifact_that_does_not_load_fails_with_what_its_consumer_said(bench: Bench, tmp_path: Path):
    out = tmp_path / "onnx"
    out.mkdir()
    (out / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(NightpressError) as caught:
        run_consumer(onnx.CONSUMER, out, bench.trial.task, name="onnx", scratch=tmp_path / "scratch")
    assert caught.value.code == ErrorCode.VERIFICATION_FAILED
    assert "onnxruntime" in caught.value.details["stderr"]
    assert "exports" in caught.value.hint


@pytest.mark.slow
def test_an_openvino_graph_of_an_unknown_opset_is_said_so(bench: Bench, tmp_path: Path):
    out = tmp_path / "openvino"
    openvino.save(bench.model, out, bench.traced, [])
    text = (out / "openvino_model.xml").read_text()
    (out / "openvino_model.xml").write_text(text.replace('version="opset1"', 'version="opset99"'))
    with pytest.raises(NightpressError, match=r"written in opset 99; the library .* does not know it") as caught:
        run_consumer(openvino.CONSUMER, out, bench.trial.task, name="openvino", scratch=tmp_path / "scratch")
    assert caught.value.code == ErrorCode.VERIFICATION_FAILED
    assert "constraints.txt" in caught.value.hint


@pytest.mark.parametrize("what", ["IR version", "opset"])
@pytest.mark.slow
def test_a_graph_newer_than_its_consumer_is_said_with_both_versions(bench: Bench, tmp_path: Path, what: str):
    import onnx as library

    out = tmp_path / "onnx"
    out.mkdir()
    model = library.load(bench.traced.path)
    if what == "opset":
        model.opset_import[0].version = 99
    else:
        model.ir_version = 99
    library.save(model, out / "model.onnx")
    with pytest.raises(NightpressError, match=rf"is written in {what} 99; .* reads up to {what} \d+") as caught:
        run_consumer(onnx.CONSUMER, out, bench.trial.task, name="onnx", scratch=tmp_path / "scratch")
    assert caught.value.code == ErrorCode.VERIFICATION_FAILED
    assert "constraints.txt" in caught.value.hint


@pytest.mark.slow
def test_the_same_graph_is_the_same_bytes_again(bench: Bench, tmp_path: Path):
    for name in ("one", "two"):
        openvino.save(bench.model, tmp_path / name, bench.traced, [(0, DynamicInt8())])
    for file in ("openvino_model.xml", "openvino_model.bin"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.slow
def test_an_artifact_that_answers_wrongly_is_found_out(bench: Bench, tmp_path: Path):
    out = tmp_path / "onnx"
    onnx.save(bench.model, out, bench.traced, [])
    observed = run_consumer(onnx.CONSUMER, out, bench.trial.task, name="onnx", scratch=tmp_path / "scratch")
    noise = np.random.default_rng(0).normal(0, 1, observed.outputs["check.values"].shape)
    wrong = replace(observed, outputs={"check.values": observed.outputs["check.values"] + noise})
    with pytest.raises(NightpressError) as caught:
        verify(bench.recipe, Export(format="onnx"), wrong, source=observed, traced=bench.traced, task=bench.trial.task)
    assert caught.value.code == ErrorCode.VERIFICATION_FAILED
    assert caught.value.details["bound"] == EXACT
    assert f"is {caught.value.details['value']:.5f}, the bound {EXACT:g}" in caught.value.message
    # Without a pass, the artifact is compared with the source instead of the pressed model.
    copied = bench.recipe.model_copy(update={"passes": ()})
    with pytest.raises(NightpressError, match="cosine of outputs with the source's"):
        verify(copied, Export(format="safetensors"), wrong, source=observed, traced=None, task=bench.trial.task)


@pytest.mark.slow
def test_an_artifact_whose_answers_are_no_numbers_is_named(bench: Bench, tmp_path: Path):
    import onnx as library

    model = library.load(bench.traced.path)
    bias = next(initializer for initializer in model.graph.initializer if list(initializer.dims) == [128])
    bias.CopyFrom(library.numpy_helper.from_array(np.full(128, np.nan, np.float32), bias.name))
    (tmp_path / "onnx").mkdir()
    library.save(model, tmp_path / "onnx" / "model.onnx")
    with pytest.raises(NightpressError, match="The artifact onnx gives outputs that are not finite") as caught:
        run_consumer(onnx.CONSUMER, tmp_path / "onnx", bench.trial.task, name="onnx", scratch=tmp_path / "scratch")
    assert caught.value.code == ErrorCode.NUMERICAL_FAILURE
    assert "gentler pass" in caught.value.hint


@pytest.mark.slow
def test_ignored_layers_stay_in_float(bench: Bench, tmp_path: Path):
    options = DynamicInt8(ignore=("re:.*query", "bert.embeddings.*"))
    names = {
        layer.name for layer in quantize_onnx(bench.traced.path, tmp_path / "q.onnx", options, rounding={}, peaks={})
    }
    planned = make_plan(bench.recipe.model_copy(update={"passes": (options,)}), bench.header).estimate
    assert planned is not None
    assert (tmp_path / "q.onnx").stat().st_size == pytest.approx(planned.output_bytes["onnx"], rel=0.02)
    assert "bert.encoder.layer.0.attention.self.key" in names
    assert not [name for name in names if "query" in name or "embeddings" in name]
    with pytest.raises(NightpressError) as caught:
        quantize_onnx(bench.traced.path, tmp_path / "none.onnx", DynamicInt8(ignore=("*",)), rounding={}, peaks={})
    assert caught.value.code == ErrorCode.INVALID_RECIPE


@pytest.mark.slow
def test_a_weight_that_lies_on_the_grid_decides_for_itself_alone(bench: Bench, tmp_path: Path):
    """Weights on the grid (from quantization-aware training) keep their codes. The others are rounded as without any such weight."""
    import onnx as library

    model = library.load(bench.traced.path)
    fold_transposes(library, model)
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    product = next(
        node for node in model.graph.node if node.op_type == "MatMul" and constants.get(node.input[1]) is not None
    )
    weight = constants[product.input[1]]
    codes, scales = codes_of(library.numpy_helper.to_array(weight), 0)
    weight.CopyFrom(library.numpy_helper.from_array((codes * scales).astype(np.float32), weight.name))
    library.save(model, tmp_path / "on-the-grid.onnx")

    def rounded(source: Path) -> dict[str, np.ndarray]:
        quantize_onnx(source, tmp_path / "out.onnx", DynamicInt8(), rounding={}, peaks={})
        return {
            initializer.name.removesuffix("_quantized"): library.numpy_helper.to_array(initializer)
            for initializer in library.load(tmp_path / "out.onnx").graph.initializer
            if initializer.name.endswith("_quantized")
        }

    plain, mixed = rounded(bench.traced.path), rounded(tmp_path / "on-the-grid.onnx")
    assert plain.keys() == mixed.keys()
    assert len(plain) > 5
    for name in plain.keys() - {weight.name}:
        np.testing.assert_array_equal(plain[name], mixed[name], err_msg=name)
    assert np.abs(plain[weight.name].astype(int)).max() <= 64
    np.testing.assert_array_equal(mixed[weight.name], codes)


def test_layers_that_one_scale_would_hurt_stay_in_float():
    sizes = {"a": 100, "b": 100, "c": 100, "big": 700}
    assert sensitive_layers({"a": 0.01, "b": 0.01, "c": 0.05, "big": 0.9}, sizes) == {"c"}
    assert not sensitive_layers({"a": 0.01, "b": 0.012}, sizes)
    assert not sensitive_layers({}, sizes)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory):
    """A small classifier with random weights. Its predictions contain both classes."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier") / "model"
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2, vocab_size=30522
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    shutil.copy(bert_tiny_dir() / "tokenizer.json", folder)
    return folder


ROWS = "".join(json.dumps({"text": f"sentence number {at} is here", "label": at % 2}) + "\n" for at in range(40))
ACCURACY = {
    "passes": [{"pass": "magnitude", "sparsity": 0.1}],
    "exports": ["safetensors"],
    "evaluate": [{"metric": "auto", "data": "mine", "samples": 40, "length": 16}],
}


@pytest.mark.slow
def test_a_classifier_is_scored_on_its_labels(classifier: Path, tmp_path: Path):
    recipe = ACCURACY | {"gates": {"accuracy": ">= 1%", "perplexity": "<= +3%"}}
    _, report, _ = press(lay_out(tmp_path / "job", classifier, recipe, {"mine": ROWS}))
    (artifact,) = report.artifacts
    found = {measurement.name: measurement for measurement in artifact.measurements}
    assert found["accuracy"].n == 40
    assert found["accuracy"].change is not None
    assert 0 <= found["top1_agreement"].low <= found["top1_agreement"].value
    assert [measurement.name for measurement in report.source.measurements] == [
        "accuracy",
        "f1",
        "class_f1",
        "class_f1",
    ]
    gates = {gate.gate.split()[0]: gate for gate in report.gates}
    assert gates["accuracy"].passed
    assert not gates["perplexity"].passed
    assert "not measured" in gates["perplexity"].explanation
    assert report.verdict == "rejected"
    assert any("Not smaller" in note for note in artifact.notes)


@pytest.mark.parametrize("label", [2, -1, "joy"])
@pytest.mark.slow
def test_a_label_that_the_model_does_not_have_is_refused(classifier: Path, tmp_path: Path, label: Any):
    rows = ROWS + json.dumps({"text": "odd", "label": label}) + "\n"
    with pytest.raises(NightpressError) as caught:
        press(lay_out(tmp_path / "job", classifier, ACCURACY, {"mine": rows}))
    assert caught.value.code == ErrorCode.INVALID_DATA
    assert not list((tmp_path / "job" / "out").iterdir())


@pytest.mark.slow
def test_perplexity_counts_every_token_once(tmp_path: Path):
    """The figure equals a direct computation over the same windows, whatever the runner's batches."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            vocab_size=30522,
        )
    )
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    shutil.copy(bert_tiny_dir() / "tokenizer.json", folder)
    header = inspect_model(FolderFiles(folder))
    recipe = parse_recipe(
        {
            "name": "t",
            "passes": [{"pass": "magnitude"}],
            "exports": ["safetensors"],
            "evaluate": [{"metric": "perplexity", "samples": 9, "length": 24}],
        }
    )
    trial = quality.prepare(recipe, header, folder, {}, threads=1)
    observed = run_consumer(safetensors.CONSUMER, folder, trial.task, name="source", scratch=tmp_path / "scratch")
    measured, bits = quality.measurements(trial, observed, None)
    ids = torch.from_numpy(trial.task.sets[1].sequences.ids)
    with torch.inference_mode():
        logits = model.eval()(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()
    assert measured.n == 9 * 23
    assert bits.name == "bits_per_byte"
    assert measured.value == pytest.approx(float(expected), rel=1e-4)
