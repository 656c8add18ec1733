"""Distillation, recovery and early exit on small models of each kind. bench/train.py measures the quality."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import read_examples
from nightpress.core.compress.data.tokenized import pad
from nightpress.core.compress.export.early_exit import trace_exits
from nightpress.core.compress.model.exits import ExitPlan, load_exits
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.press import lay_out, press
from tests.training import classifier, embedder, language_model, rows, run_pass

_TRAIN = {"data": "mine", "length": 16, "batch": 8, "steps": 6, "validation": 0.1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(bert_tiny, tmp_path_factory.mktemp("model") / "classifier")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


# Distill -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_learns_from_labels_and_every_kind_of_answer(model: Path, data: Path, tmp_path: Path):
    options = {
        "pass": "distill",
        "student": {"config": {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}},
        "logits": {"alpha": 0.5},
        "hidden": {"layers": [1, 3]},
        "relations": {"heads": 4, "layer": -1},
        "train": {**_TRAIN, "steps": 40, "learning_rate": 5e-3, "gradient_checkpointing": True},
    }
    out, record = run_pass(model, tmp_path, options, data_files={"mine": data})
    student = AutoModelForSequenceClassification.from_pretrained(out)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 16)
    curves = {curve.name: curve.y for curve in record.series}
    for part in ("loss", "hidden"):
        assert curves[f"train {part}"][-1] < curves[f"train {part}"][0], part
    assert set(record.summary["losses"]) == {"logits", "hidden", "relations"}


@pytest.mark.slow
def test_a_cut_student_starts_as_its_teacher_and_keeps_its_embeddings(model: Path, data: Path, tmp_path: Path):
    options = {"pass": "distill", "student": {"layers": [1, 3]}, "train": {**_TRAIN, "learning_rate": 1e-12}}
    out, record = run_pass(model, tmp_path, options, data_files={"mine": data})
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert record.summary["layer_map"] == [1, 3]
    for ours, theirs in ((0, 1), (1, 3)):
        name = "bert.encoder.layer.{}.output.dense.weight"
        assert torch.allclose(after[name.format(ours)], before[name.format(theirs)], atol=1e-6)
    word = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(after[word], before[word])
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.slow
def test_a_masked_language_model_teaches_words(cache: bool, bert_tiny: Path, data: Path, tmp_path: Path):
    options = {
        "pass": "distill",
        "student": {"layers": 1},
        "logits": {"cache": cache, "cache_top": 8, "alpha": 0.9},
        "train": {**_TRAIN, "steps": 2, "validation": 0},
    }
    out, record = run_pass(bert_tiny, tmp_path, options, data_files={"mine": data})
    assert AutoModelForMaskedLM.from_pretrained(out).config.num_hidden_layers == 1
    assert (record.summary["cached_logits"] is not None) == cache


@pytest.mark.slow
def test_an_embedder_teaches_directions(bert_tiny: Path, data: Path, tmp_path: Path):
    source = embedder(bert_tiny, tmp_path / "source")
    student = {"config": {"num_hidden_layers": 2, "intermediate_size": 32}}
    options = {"pass": "distill", "student": student, "train": {**_TRAIN, "steps": 40, "learning_rate": 3e-3}}
    out, record = run_pass(source, tmp_path, options, data_files={"mine": data})
    assert record.summary["losses"] == ["cosine"]
    assert AutoModel.from_pretrained(out).config.num_hidden_layers == 2
    curve = next(curve for curve in record.series if curve.name == "validation cosine")
    assert curve.y[-1] < curve.y[0]


@pytest.mark.slow
def test_a_reranker_teaches_scores_in_full_precision(bert_tiny: Path, tmp_path: Path):
    source = classifier(bert_tiny, tmp_path / "source", outputs=1)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"query": f"word {at}", "document": f"text {at % 3}"}) + "\n" for at in range(32))
    )
    options = {"pass": "distill", "student": {"layers": [0]}, "altered": 0.5, "train": {**_TRAIN, "precision": "fp32"}}
    _, record = run_pass(source, tmp_path, options, data_files={"mine": pairs})
    assert record.summary["losses"] == ["logits"]


def test_rows_of_an_embedder_stay_whole_without_labels(bert_tiny: Path, tmp_path: Path):
    source, texts = embedder(bert_tiny, tmp_path / "source"), tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a text of {at} words"}) + "\n" for at in range(9)))
    header = inspect_model(FolderFiles(source))
    assert len(read_examples(source, header, "mine", texts, length=64, labelled=False)) == 9


@pytest.mark.slow
def test_only_the_tokens_that_occur_change_in_trained_embeddings(model: Path, tmp_path: Path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "the lamp", "label": at % 2}) + "\n" for at in range(32)))
    train = {**_TRAIN, "freeze_embeddings": False, "weight_decay": 0.5}
    options = {"pass": "distill", "student": {"layers": [0, 2]}, "train": train}
    out, _ = run_pass(model, tmp_path, options, data_files={"mine": texts})
    name = "bert.embeddings.word_embeddings.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (model, out))
    changed = (before != after).any(1).nonzero()[:, 0].tolist()
    assert 0 < len(changed) <= 4  # two words, and the special tokens


@pytest.mark.slow
def test_a_decoder_teaches_tokens_and_relations(bert_tiny: Path, data: Path, tmp_path: Path):
    source = language_model(bert_tiny, tmp_path / "source")
    options = {
        "pass": "distill",
        "student": {"layers": [0, 3]},
        "logits": {"alpha": 0.5},
        "relations": {"heads": 2},
        "train": {**_TRAIN, "length": 12},
    }
    out, _ = run_pass(source, tmp_path, options, data_files={"mine": data})
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"student": {"config": {"vocab_size": 100, "hidden_size": 16}}}, "same tokens"),
        ({"student": {"config": {"num_labels": 3, "hidden_size": 16}}}, "num_labels"),
        ({"student": {"layers": [0, 4]}}, "out of range"),
        ({"student": {"layers": 9}}, "out of range"),
        ({"student": {"layers": 4}}, "no smaller"),
        ({"student": {"config": {"hidden_size": 18}}}, "divide"),
        ({"student": {"layers": 2}, "hidden": {"layers": [1, 7]}}, "block 7"),
        ({"student": {"layers": 2}, "hidden": {"layers": [1]}}, "names 1 blocks"),
        ({"relations": {"heads": 5}}, "divide"),
        ({"relations": {"heads": 4, "layer": 4}}, "relations.layer"),
        ({"cosine": {}}, "embedder"),
        ({"logits": {"alpha": 0.5}, "train": {"data": "builtin:prose"}}, "labels"),
        ({"logits": {"cache": True}, "hidden": {}}, "caching"),
        ({"logits": {"cache": True}, "altered": 0.5}, "must answer anew"),
        ({"train": {"length": 4096}}, "positions"),
        ({"student": {"layers": 2, "preset": "tiny"}}, "cuts"),
        ({"train": {"steps": 5, "epochs": 2}}, "not both"),
        ({"train": {"patience": 2, "validation": 0}}, "patience"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_it_runs(options: dict[str, Any], said: str, model: Path):
    with pytest.raises(NightpressError, match=said) as caught:
        make_plan(
            parse_recipe({"name": "x", "passes": [{"pass": "distill", **options}], "exports": ["safetensors"]}),
            inspect_model(FolderFiles(model)),
        )
    assert caught.value.code == ErrorCode.INVALID_RECIPE


def test_an_embedder_of_another_width_is_refused(bert_tiny: Path, tmp_path: Path):
    source = embedder(bert_tiny, tmp_path / "source")
    recipe = {
        "name": "x",
        "passes": [{"pass": "distill", "student": {"config": {"hidden_size": 16}}}],
        "exports": ["onnx"],
    }
    with pytest.raises(NightpressError, match="could not be compared"):
        make_plan(parse_recipe(recipe), inspect_model(FolderFiles(source)))


@pytest.mark.slow
def test_missing_labels_are_found_in_the_data_and_named(model: Path, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {at}"}) + "\n" for at in range(50)))
    with pytest.raises(NightpressError, match="label") as caught:
        run_pass(
            model, tmp_path, {"pass": "distill", "logits": {"alpha": 0.5}, "train": _TRAIN}, data_files={"mine": file}
        )
    assert caught.value.code == ErrorCode.INVALID_DATA
    run_pass(model, tmp_path, {"pass": "distill", "train": {**_TRAIN, "steps": 1}}, data_files={"mine": file})


@pytest.mark.slow
def test_a_whole_job_distils_and_its_report_has_the_curves(model: Path, data: Path, tmp_path: Path):
    recipe = {
        "passes": [{"pass": "distill", "student": {"layers": 2}, "logits": {"alpha": 0.5}, "train": _TRAIN}],
        "exports": ["safetensors"],
        "evaluate": [{"metric": "accuracy", "data": "mine", "samples": 40, "length": 16}],
    }
    _, report, frames = press(lay_out(tmp_path / "job", model, recipe, {"mine": data.read_text()}))
    assert {curve.name for curve in report.passes[0].series} >= {"train loss", "validation loss", "validation accuracy"}
    assert any(getattr(frame, "name", "") == "train.loss" for frame in frames)
    assert report.artifacts[0].size_bytes < report.source.size_bytes


# Recover -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.slow
def test_recovering_learns_from_the_source_and_leaves_zeros_zero(lora: Any, model: Path, data: Path, tmp_path: Path):
    pruned = shutil.copytree(model, tmp_path / "pruned")
    tensors = load_file(pruned / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    gone = tensors[name].abs() < tensors[name].abs().median()
    worse = "bert.encoder.layer.2.output.dense.weight"
    damaged = {name: tensors[name].masked_fill(gone, 0), worse: 30 * tensors[worse]}
    save_file(tensors | damaged, pruned / "model.safetensors", metadata={"format": "pt"})
    options = {"pass": "recover", "lora": lora, "hidden": {}, "train": {**_TRAIN, "steps": 25}}
    out, record = run_pass(pruned, tmp_path, options, data_files={"mine": data}, origin=model)
    after = load_file(out / "model.safetensors")
    assert after.keys() == tensors.keys()
    assert torch.equal(after[name] == 0, gone)
    assert not torch.equal(after[name], tensors[name].masked_fill(gone, 0))
    curve = next(curve for curve in record.series if curve.name == "validation hidden")
    assert curve.y[-1] < curve.y[0]


def test_recovering_from_nothing_is_warned_of(model: Path):
    def warned(*passes: dict[str, Any]) -> bool:
        recipe = parse_recipe({"name": "x", "passes": list(passes), "exports": ["onnx"]})
        return any("recover" in warning for warning in make_plan(recipe, inspect_model(FolderFiles(model))).warnings)

    recover = {"pass": "recover", "train": {"data": "mine", "length": 16}}
    assert warned(recover)
    assert not warned({"pass": "layers"}, recover)


@pytest.mark.slow
def test_each_training_of_a_recipe_is_its_own_though_two_read_alike(model: Path, data: Path, tmp_path: Path):
    """Of two passes with the same options, data and shapes, the second uses neither the first's checkpoints nor its cached answers."""
    recover = {"pass": "recover", "logits": {"cache": True}, "train": _TRAIN}
    distill = {"pass": "distill", "logits": {"cache": True}, "train": _TRAIN}
    prune = {"pass": "magnitude", "sparsity": 0.5}
    recipe = {
        "passes": [recover, prune, recover, distill, distill],
        "exports": ["safetensors"],
        "evaluate": [{"metric": "accuracy", "data": "mine", "samples": 40, "length": 16}],
    }
    job = lay_out(tmp_path / "job", model, recipe, {"mine": data.read_text()})
    _, report, _ = press(job)
    trained = [options.summary for options in report.passes if options.name in {"recover", "distill"}]
    assert [record["resumed_from"] for record in trained] == [0, 0, 0, 0]
    assert len(list((job / "work" / "answers").iterdir())) == 4


# Early exit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["confidence", "patience", "length"])
@pytest.mark.slow
def test_the_graph_with_exits_answers_as_the_module_and_skips_blocks(
    policy: str, bert_tiny: Path, data: Path, tmp_path: Path
):
    model = classifier(bert_tiny, tmp_path / "model", blocks=3 if policy == "patience" else 2)
    options = {
        "pass": "early-exit",
        "policy": policy,
        "max_loss": 0.2,
        "train": {**_TRAIN, "steps": 8, "validation": 0.3},
    }
    out, record = run_pass(model, tmp_path, options, export="onnx", data_files={"mine": data})
    header = inspect_model(FolderFiles(model))
    random = np.random.default_rng(0)
    check = pad([random.integers(1000, 20000, count).tolist() for count in (5, 12, 9, 30, 7, 16)], 0)
    traced = trace_exits(out, header, check, PassContext(header=header, work_dir=tmp_path / "work"))
    graph = onnx.load(traced.path)
    onnx.checker.check_model(graph, full_check=True)
    # Only the blocks before the first exit are outside a branch.
    outside = [node for node in graph.graph.node if node.op_type == "Softmax"]
    assert len(outside) == 1
    assert sum(node.op_type == "If" for node in graph.graph.node) == 1
    module, plan = load_exits(out, header)
    session = onnxruntime.InferenceSession(traced.path, _quiet())
    feeds = {"input_ids": check.ids, "attention_mask": check.mask, "token_type_ids": np.zeros_like(check.ids)}
    with torch.no_grad():
        scores = torch.stack(module(torch.from_numpy(check.ids), torch.from_numpy(check.mask)).scores)
    levels = [plan.threshold, 0.0, float(scores.median()) - 1e-4, float(scores.max()) + 1]
    for threshold in levels:
        logits, depth = session.run(None, {**feeds, "threshold": np.asarray(threshold, np.float32)})
        with torch.no_grad():
            wanted, blocks = module.answer(
                torch.from_numpy(check.ids),
                torch.from_numpy(check.mask),
                plan.model_copy(update={"threshold": threshold}),
            )
        np.testing.assert_allclose(logits, wanted.numpy(), atol=2e-5)
        assert depth.tolist() == blocks.tolist()
    np.testing.assert_allclose(session.run(None, feeds)[0], traced.check, atol=2e-5)
    assert record.summary["held_apart"]["accuracy"] >= record.summary["full_depth_accuracy"] - 0.2
    assert session.run(None, {**feeds, "threshold": np.asarray(0, np.float32)})[1].tolist() == [1] * 6


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


@pytest.mark.slow
def test_frozen_blocks_stay_as_they_are(model: Path, data: Path, tmp_path: Path):
    options = {
        "pass": "early-exit",
        "thaw": False,
        "exits": [1],
        "choose_on": "unseen",
        "train": {**_TRAIN, "validation": 0},
    }
    files = {"mine": data, "unseen": rows(tmp_path / "unseen.jsonl", 33)}
    out, record = run_pass(model, tmp_path, options, export="onnx", data_files=files)
    shares = np.asarray(record.summary["held_apart"]["share"]) * 33
    np.testing.assert_allclose(shares, shares.round(), atol=1e-9)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert ExitPlan.model_validate_json((out / "exits.json").read_bytes()).depths == (2, 4)


@pytest.mark.slow
def test_a_whole_job_leaves_a_graph_that_a_runtime_loads_without_our_code(bert_tiny: Path, data: Path, tmp_path: Path):
    model = classifier(bert_tiny, tmp_path / "model", blocks=2)
    recipe = {
        "passes": [{"pass": "early-exit", "exits": [0], "train": _TRAIN}],
        "exports": ["onnx"],
        "evaluate": [{"metric": "accuracy", "data": "mine", "samples": 40, "length": 16}],
    }
    job = lay_out(tmp_path / "job", model, recipe, {"mine": data.read_text()})
    _, report, _ = press(job)
    artifact = report.artifacts[0]
    assert artifact.verification is not None
    assert artifact.verification.passed
    assert not list((job / "out" / "onnx").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exits": [3]}, "out of range"),
        ({"exits": [1, 0]}, "order"),
        ({"train": {"data": "builtin:prose"}}, "labels"),
        ({"train": {"data": "mine", "validation": 0}}, "threshold"),
    ],
)
def test_exits_that_cannot_be_are_refused(options: dict[str, Any], said: str, model: Path):
    recipe = {"name": "x", "passes": [{"pass": "early-exit", **options}], "exports": ["onnx"]}
    with pytest.raises(NightpressError, match=said):
        make_plan(parse_recipe(recipe), inspect_model(FolderFiles(model)))


@pytest.mark.slow
def test_a_language_model_drafts_with_its_first_blocks_and_says_what_it_would_have_said(
    bert_tiny: Path, data: Path, tmp_path: Path
):
    source = language_model(bert_tiny, tmp_path / "source")
    options = {"pass": "early-exit", "exits": [1], "train": {"data": "builtin:prose"}}
    out, record = run_pass(source, tmp_path, options)
    assert json.loads((out / "generation_config.json").read_text())["assistant_early_exit"] == 2
    assert record.summary["tried"][0]["equal"] == record.summary["prompts"]
    ids = torch.randint(1000, 20000, (1, 12), generator=torch.Generator().manual_seed(0))
    said = [
        AutoModelForCausalLM.from_pretrained(folder).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
        for folder in (source, out)
    ]
    assert torch.equal(*said)
