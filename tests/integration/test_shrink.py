"""Removing channels, heads and blocks: smaller matrices, exactly the expected outputs, and files that load elsewhere."""

import json
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import writer
from nightpress.core.compress.executors.blocks.resume import RunFiles
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes import anatomy
from nightpress.core.recipes.anatomy import OWN_SHAPES, anatomy_of
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.block_models import FAMILIES, save_model
from tests.press import lay_out, press

_CALIBRATION = Calibration(samples=4, length=16)
_ENOUGH = Calibration(samples=32, length=32)
_SHRINKING = [name for name in FAMILIES if getattr(transformers, name).config_class.model_type in anatomy.FAMILIES]
_HEADS_STAY = {"MPNetForMaskedLM", "DebertaV2ForMaskedLM"}


def _model(class_name: str, folder: Path) -> Path:
    """A small model of the family, with a tokenizer of single letters."""
    if not folder.exists():
        save_model(class_name, folder)
        letters = {token: at for at, token in enumerate(["[UNK]", "[PAD]", "</s>", *string.ascii_letters])}
        tokenizer = Tokenizer(models.WordLevel(letters, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _shrink(source: Path, work: Path, pass_: dict[str, Any], **context: Any) -> tuple[Path, PassRecord]:
    header = inspect_model(FolderFiles(source))
    options = parse_recipe({"name": "r", "passes": [pass_], "exports": ["onnx"]}).passes[0]
    options.check(header)
    given = PassContext(header=header, work_dir=work / "work", **{"calibration": _CALIBRATION, **context})
    record = MODEL_PASSES[pass_["pass"]](source, work / "out", options, given)
    after = inspect_model(FolderFiles(work / "out"))
    if pass_.get("across") != "global":  # the plan predicted every shape and the config
        assert {tensor.name: tensor.shape for tensor in after.tensors} == {
            tensor.name: tensor.shape for tensor in options.leaves(header).tensors
        } or pass_["pass"] == "layers"
        assert after.parameters == options.leaves(header).parameters
        assert after.config == options.leaves(header).config or pass_["pass"] == "layers"
    return work / "out", record


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _answers(folder: Path, ids: Tensor | None = None) -> Tensor:
    model = load_model(folder, inspect_model(FolderFiles(folder)))
    if ids is None:
        ids = torch.randint(5, 55, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(input_ids=ids)
    found: Tensor = out.logits
    return found


def _with_zeros(source: Path, pruned: Path, which: str, folder: Path) -> Path:
    """The source with zeros in place of the removed units: in the columns of each output projection that the pruned model lacks."""
    parts = anatomy_of(inspect_model(FolderFiles(source)), "test")
    inner = parts.family.feed_forward if which == "channels" else parts.family.attention
    shutil.copytree(source, folder)
    (path,) = folder.glob("*.safetensors")
    tensors, small = load_file(path), _tensors(pruned)
    for block in range(parts.layers):
        name = parts.name(block, inner.output)
        side = 0 if parts.transposed else 1
        left = {bytes(unit.contiguous().numpy()) for unit in small[name].unbind(side)}
        for column in tensors[name].unbind(side):
            if bytes(column.contiguous().numpy()) not in left:
                column.zero_()
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("which", ["channels", "heads"])
@pytest.mark.parametrize("class_name", _SHRINKING)
@pytest.mark.slow
def test_the_smaller_model_computes_what_the_source_does_without_those_units(
    class_name: str, which: str, tmp_path: Path
):
    if which == "heads" and class_name in _HEADS_STAY:
        pytest.skip("its heads can't go; another test asks why")
    source = _model(class_name, tmp_path / "source")
    pass_ = {"pass": which, "share": 0.5, "compensate": False} | ({"multiple": 8} if which == "channels" else {})
    pruned, record = _shrink(source, tmp_path, pass_)
    expected = _answers(_with_zeros(source, pruned, which, tmp_path / "zeros"))
    assert torch.allclose(_answers(pruned), expected, atol=1e-4)
    assert record.summary["parameters_after"] < record.summary["parameters_before"]
    assert all(layer.bytes_after == layer.bytes_before / 2 for layer in record.layers)
    config = json.loads((pruned / "config.json").read_bytes())
    if which == "channels" or "num_key_value_heads" in config or class_name.startswith("Phi"):
        from transformers import AutoModel

        assert OWN_SHAPES not in config
        AutoModel.from_pretrained(pruned)  # a normal checkpoint, without settings of ours


@pytest.mark.parametrize("importance", ["l1", "l2", "activation", "taylor"])
@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "RobertaForSequenceClassification"])
@pytest.mark.slow
def test_making_up_for_what_went_brings_the_answers_nearer(class_name: str, importance: str, tmp_path: Path):
    source = _model(class_name, tmp_path / "source")
    context = PassContext(inspect_model(FolderFiles(source)), tmp_path, calibration=_ENOUGH)
    ids = calibration_samples(source, context)["input_ids"]
    distance = {}
    for compensate in (True, False):
        pass_ = {"pass": "channels", "multiple": 8, "importance": importance, "compensate": compensate}
        pruned, _ = _shrink(source, tmp_path / str(compensate), pass_, calibration=_ENOUGH)
        distance[compensate] = float((_answers(pruned, ids) - _answers(source, ids)).norm())
    assert 0 < distance[True] < distance[False]


@pytest.mark.parametrize("which", ["channels", "heads"])
@pytest.mark.slow
def test_a_global_share_leaves_layers_of_differing_widths_that_sum_up(which: str, tmp_path: Path):
    source = _model("BertForMaskedLM", tmp_path / "source")
    pass_ = {"pass": which, "across": "global", "share": 0.4} | ({"multiple": 2} if which == "channels" else {})
    pruned, record = _shrink(source, tmp_path, pass_)
    kept, units = record.summary["kept"], record.summary["units"]
    assert sum(kept) == pytest.approx(0.6 * sum(units), abs=1)
    assert len(set(kept)) > 1
    assert torch.isfinite(_answers(pruned)).all()
    # Another pass can run on the result.
    again, record = _shrink(pruned, tmp_path / "again", {"pass": "channels", "share": 0.5, "multiple": 2})
    assert torch.isfinite(_answers(again)).all()


@pytest.mark.parametrize("importance", ["block-influence", "taylor"])
@pytest.mark.parametrize("kind", ["vit", "beit"])
def test_a_model_that_sees_is_judged_by_what_images_show(kind: str, importance: str, tmp_path: Path):
    model_class = {"vit": transformers.ViTForImageClassification, "beit": transformers.BeitForImageClassification}[kind]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
    torch.manual_seed(0)
    config = model_class.config_class(**sizes, image_size=32, patch_size=8, num_labels=3)
    model_class(config).save_pretrained(tmp_path / "model")
    out, record = _shrink(tmp_path / "model", tmp_path / "work", {"pass": "layers", "importance": importance})
    assert len(record.summary["kept"]) == 2
    assert all(value > 0 for value in record.summary["importance"])
    loaded = load_model(out, inspect_model(FolderFiles(out))).eval()
    with torch.no_grad():
        assert torch.isfinite(loaded(pixel_values=torch.rand(2, 3, 32, 32)).logits).all()


@pytest.mark.slow
def test_blocks_go_by_influence_by_gradient_or_by_name(tmp_path: Path):
    source = _model("Gemma2ForCausalLM", tmp_path / "source")
    tensors = _tensors(source)
    for name, tensor in tensors.items():  # so that the middle block changes almost nothing
        if name.startswith("model.layers.1.post_"):
            tensor.fill_(-0.999)
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = {}
    for how in ({"importance": "block-influence"}, {"importance": "taylor"}, {"remove": [1]}):
        pruned, record = _shrink(source, tmp_path / str(len(found)), {"pass": "layers", **how})
        assert record.summary["removed"] == [1]
        found[str(how)] = (pruned / "model.safetensors").read_bytes()
        config = json.loads((pruned / "config.json").read_bytes())
        assert config["num_hidden_layers"] == 2
        assert len(config["layer_types"]) == 2
    assert len(set(found.values())) == 1
    left = _tensors(tmp_path / "0" / "out")
    assert torch.equal(left["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"])
    assert torch.allclose(_answers(tmp_path / "0" / "out"), _answers(source), atol=0.05)


@pytest.mark.parametrize(
    "pass_", [{"pass": "channels", "multiple": 8, "across": "global"}, {"pass": "heads", "share": 0.5}]
)
@pytest.mark.slow
def test_a_killed_attempt_ends_with_the_same_bytes(
    pass_: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = _model("LlamaForCausalLM", tmp_path / "source")
    whole, _ = _shrink(source, tmp_path / "whole", pass_)
    write, written = writer.write_block, []

    def dying(files: RunFiles, output: writer.BlockOutput) -> None:
        if output.index == 2:
            raise KeyboardInterrupt
        written.append(output.index)
        write(files, output)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_block", dying)
        with pytest.raises(KeyboardInterrupt):
            _shrink(source, tmp_path / "killed", pass_)
    assert written == [0, 1]
    resumed, _ = _shrink(source, tmp_path / "killed", pass_)
    for path in whole.iterdir():
        assert path.read_bytes() == (resumed / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("class_name", "pass_", "exports", "reason"),
    [
        ("MPNetForMaskedLM", {"pass": "heads"}, ["onnx"], "table of positions"),
        ("BertForMaskedLM", {"pass": "heads"}, ["safetensors"], "ties the heads' width to the hidden size"),
        ("BertForMaskedLM", {"pass": "channels", "across": "global"}, ["safetensors"], "differing widths"),
        ("BertForMaskedLM", {"pass": "channels", "share": 0.9}, ["onnx"], "would leave nothing"),
        ("BertForMaskedLM", {"pass": "channels", "share": 0.1}, ["onnx"], "would change nothing"),
        ("BertForMaskedLM", {"pass": "heads", "share": 0.95}, ["onnx"], "would leave nothing"),
        ("BertForMaskedLM", {"pass": "layers", "count": 3}, ["onnx"], "would leave nothing"),
        ("BertForMaskedLM", {"pass": "layers", "remove": [3]}, ["onnx"], "no block 3"),
    ],
)
def test_what_can_not_work_is_refused_with_its_reason(
    class_name: str, pass_: dict[str, Any], exports: list[str], reason: str, tmp_path: Path
):
    header = inspect_model(FolderFiles(_model(class_name, tmp_path / "source")))
    with pytest.raises(NightpressError, match=reason) as caught:
        make_plan(parse_recipe({"name": "r", "passes": [pass_], "exports": exports}), header)
    assert caught.value.code is ErrorCode.INVALID_RECIPE
    assert caught.value.hint


def test_a_llama_whose_hidden_size_the_heads_would_not_divide_is_told_what_would(tmp_path: Path):
    from tests.folders import header_of, tiny_llama

    header = header_of(tiny_llama(tmp_path / "m", num_attention_heads=8, num_key_value_heads=4))
    with pytest.raises(NightpressError, match=r"must divide its hidden size of 64: 2, 4 of 8"):
        make_plan(parse_recipe({"name": "r", "passes": [{"pass": "heads"}], "exports": ["safetensors"]}), header)
    half = parse_recipe({"name": "r", "passes": [{"pass": "heads", "share": 0.5}], "exports": ["safetensors"]})
    plan = make_plan(half, header)
    assert plan.estimate is not None
    assert plan.estimate.output_bytes["safetensors"] < header.size


@pytest.mark.slow
def test_a_whole_job_shrinks_quantizes_and_is_proven_by_every_consumer(bert_tiny: Path, tmp_path: Path):
    recipe = {
        "passes": [
            {"pass": "channels", "share": 0.5},
            {"pass": "heads", "share": 0.5},
            {"pass": "layers", "count": 1},
            {"pass": "dynamic-int8"},
        ],
        "exports": ["onnx", "openvino"],
        "calibration": {"samples": 8, "length": 32},
        "evaluate": [{"metric": "auto", "samples": 8, "length": 32}],
    }
    _, report, _ = press(lay_out(tmp_path / "job", bert_tiny, recipe))
    assert report.artifacts[0].parameters < report.source.parameters
    for artifact in report.artifacts:
        assert artifact.verification is not None
        assert artifact.verification.passed
        assert artifact.size_bytes < 0.6 * report.source.size_bytes  # most bytes are embeddings
    names = [options.name for options in report.passes]
    assert names[:3] == ["channels", "heads", "layers"]


@pytest.mark.slow
def test_a_normal_checkpoint_is_read_by_transformers_as_the_whole_job_proves(bert_tiny: Path, tmp_path: Path):
    recipe = {
        "passes": [{"pass": "channels", "share": 0.5}, {"pass": "layers"}],
        "exports": ["safetensors"],
        "calibration": {"samples": 8, "length": 32},
        "evaluate": [{"metric": "auto", "samples": 8, "length": 32}],
    }
    job = lay_out(tmp_path / "job", bert_tiny, recipe)
    _, report, _ = press(job)
    (artifact,) = report.artifacts
    assert artifact.verification.consumer.startswith("transformers")
    assert artifact.parameters == inspect_model(FolderFiles(job / "out" / "safetensors")).parameters


@pytest.mark.slow
def test_what_was_cut_learns_again_in_the_shapes_it_has(bert_tiny: Path, tmp_path: Path):
    recipe = {
        "passes": [
            {"pass": "layers", "count": 1},  # one is left: a trace takes long
            {"pass": "heads", "share": 0.5},
            {"pass": "recover", "train": {"data": "few", "epochs": 1, "batch": 4, "length": 16, "validation": 0}},
        ],
        "exports": ["onnx"],
        "calibration": {"samples": 8, "length": 32},
        "evaluate": [],
    }
    few = "\n".join(json.dumps({"text": f"The {word} of the night is a press."}) for word in string.ascii_letters[:8])
    _, report, _ = press(lay_out(tmp_path / "job", bert_tiny, recipe, {"few": few}))
    (artifact,) = report.artifacts
    assert artifact.verification is not None
    assert artifact.verification.passed
    assert artifact.parameters < report.source.parameters
