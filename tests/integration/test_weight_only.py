"""Weights rounded to nearest: the result loads in transformers, gives nearly the source's outputs, and has the planned size."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.utils import logging

from nightpress.core.compress.export import compressed_tensors
from nightpress.core.compress.model.checkpoint import INDEX_FILE, ShardWriter, read_shards
from nightpress.core.compress.model.quantization_config import quantization_config
from nightpress.core.compress.passes import MODEL_PASSES, PassContext, quantize
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.linears import is_linear_weight
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import WeightOnly
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.schemes import Scheme
from tests.folders import header_of, load_tensors, tiny_llama

CASES = [
    {"bits": 8},
    {"bits": 8, "group_size": 32},
    {"bits": 4, "group_size": 32},
    {"bits": 8, "symmetric": False},
    {"bits": 4, "group_size": 32, "symmetric": False},
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def press(source: Path, target: Path, threads: int = 2, **options: object) -> PassRecord:
    context = PassContext(header=header_of(source), work_dir=target.parent / "work", threads=threads)
    return MODEL_PASSES["weight-only"](source, target, WeightOnly.model_validate(options), context)


def logits(folder: Path, head: type) -> torch.Tensor:
    """The model's logits, in float32, so that only the weights differ."""
    model = head.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        answer: torch.Tensor = model(torch.arange(5, 37)[None]).logits
    return answer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_decoder_answers_as_its_source_with_rounded_weights_would(
    llama: Path, tmp_path: Path, case: dict[str, object]
):
    press(llama, tmp_path / "out", **case)
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in dequantized(tmp_path / "out").items():
            expected.get_parameter(name).copy_(tensor)
        reference = expected(torch.arange(5, 37)[None]).logits
    answer = logits(tmp_path / "out", AutoModelForCausalLM)
    assert float((answer - reference).norm() / reference.norm()) < 0.01  # the loader dequantizes in bf16
    source = logits(llama, AutoModelForCausalLM)
    assert float((answer - source).norm() / source.norm()) < (0.03 if case["bits"] == 8 else 0.5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bert_answers_nearly_as_before(bert_tiny: Path, tmp_path: Path, case: dict[str, object]):
    press(bert_tiny, tmp_path / "out", **case)
    source, answer = logits(bert_tiny, AutoModelForMaskedLM), logits(tmp_path / "out", AutoModelForMaskedLM)
    assert float((answer - source).norm() / source.norm()) < (0.01 if case["bits"] == 8 else 0.12)


def test_bert_loads_under_another_head(bert_tiny: Path, tmp_path: Path):
    """AutoModel removes the prefix `bert.` of the names in the files."""
    from transformers import AutoModel

    press(bert_tiny, tmp_path / "out", bits=8)
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        source, answer = (AutoModel.from_pretrained(folder).eval()(ids)[0] for folder in (bert_tiny, tmp_path / "out"))
    assert float((answer - source).norm() / source.norm()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_weight_is_within_half_a_step_and_the_rest_untouched(
    tmp_path: Path, case: dict[str, object], dtype: torch.dtype
):
    source = tiny_llama(tmp_path / "source", dtype=dtype, shards=3)
    record = press(source, tmp_path / "out", **case)
    before, after, back = load_tensors(source), load_tensors(tmp_path / "out"), dequantized(tmp_path / "out")
    linears = {tensor.name for tensor in header_of(source).tensors if is_linear_weight(tensor, WeightOnly().ignore)}
    assert set(back) == linears == {f"{layer.name}.weight" for layer in record.layers}
    assert len(linears) == 14
    for name, tensor in back.items():
        scale = after[f"{name}_scale"].double()
        steps = scale.repeat_interleave(tensor.shape[1] // scale.shape[1], dim=1)
        assert float(((tensor.double() - before[name].double()).abs() / steps).max()) <= 0.5 + 5e-5
    for name in set(before) - linears:
        assert torch.equal(before[name], after[name])
    errors = {f"{layer.name}.weight": layer.relative_error for layer in record.layers}
    for name, tensor in back.items():
        exact = float((tensor.double() - before[name].double()).norm() / before[name].double().norm())
        assert errors[name] == pytest.approx(exact, rel=1e-3)


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, dequantized to float32 by the library's decompressor as config.json describes them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_bytes())["quantization_config"])
    (scheme,) = config.config_groups.values()
    tensors = load_tensors(folder)
    result = {}
    for name in [tensor.removesuffix("_packed") for tensor in tensors if tensor.endswith("_packed")]:
        parts = ("packed", "scale", "shape", "zero_point")
        state = {f"weight_{part}": tensors[f"{name}_{part}"] for part in parts if f"{name}_{part}" in tensors}
        state["weight_scale"] = state["weight_scale"].float()
        result[name] = BaseCompressor.get_value_from_registry(config.format).decompress(state, scheme)["weight"]
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_knows_the_size(bert_tiny: Path, tmp_path: Path, case: dict[str, object]):
    recipe = parse_recipe({"name": "r", "passes": [{"pass": "weight-only", **case}], "exports": ["compressed-tensors"]})
    plan = make_plan(recipe, header_of(bert_tiny))
    press(bert_tiny, tmp_path / "out", **case)
    shards = read_shards(tmp_path / "out")
    assert plan.estimate is not None
    assert plan.estimate.output_bytes["compressed-tensors"] == sum(
        tensor.info.size for shard in shards for tensor in shard.tensors
    )
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert on_disk == pytest.approx(plan.estimate.output_bytes["compressed-tensors"], rel=0.02)


def test_errors_of_large_layers_are_measured_on_a_sample_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tiny_llama(tmp_path / "source", hidden_size=256, intermediate_size=512)
    exact = press(source, tmp_path / "exact", bits=4, group_size=32).layers
    monkeypatch.setattr(quantize, "_EXACT_WEIGHTS", 0)
    sampled = press(source, tmp_path / "sampled", bits=4, group_size=32).layers
    for row, other in zip(exact, sampled, strict=True):
        assert row.relative_error != other.relative_error
        assert row.relative_error == pytest.approx(other.relative_error, rel=0.03)
    assert load_tensors(tmp_path / "exact").keys() == load_tensors(tmp_path / "sampled").keys()


def test_number_of_threads_and_attempts_change_no_byte(tmp_path: Path):
    source = tiny_llama(tmp_path / "source", shards=2)
    folders = []
    for threads in (1, 3):
        folders.append(tmp_path / str(threads) / "out")
        press(source, folders[-1], threads=threads, bits=4, group_size=16)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert {"config.json", "tokenizer.json", INDEX_FILE} < set(first)


def test_the_index_names_every_tensor(tmp_path: Path):
    source = tiny_llama(tmp_path / "source", shards=2)
    press(source, tmp_path / "out", bits=8)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_bytes())
    shards = read_shards(tmp_path / "out")
    assert index["weight_map"] == {tensor.name: shard.path.name for shard in shards for tensor in shard.tensors}
    assert index["metadata"]["total_size"] == sum(tensor.info.size for shard in shards for tensor in shard.tensors)


def test_a_second_attempt_goes_on_after_the_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tiny_llama(tmp_path / "source", shards=3)
    press(source, tmp_path / "whole" / "out", bits=8)
    commit, committed = ShardWriter.commit, []

    def die_on_the_second(writer: ShardWriter) -> None:
        if len(committed) == 1:
            raise KeyboardInterrupt
        commit(writer)
        committed.append(writer.path.name)

    monkeypatch.setattr(ShardWriter, "commit", die_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        press(source, tmp_path / "out", bits=8)
    assert [path.name for path in (tmp_path / "out").iterdir()] == committed

    def count(writer: ShardWriter) -> None:
        commit(writer)
        committed.append(writer.path.name)

    monkeypatch.setattr(ShardWriter, "commit", count)
    resumed = press(source, tmp_path / "out", bits=8)
    assert len(committed) == len(set(committed)) == 3  # no shard was committed twice
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    assert len(resumed.layers) == 14  # with the layers of the shard that was finished before

    press(source, tmp_path / "out", bits=8, symmetric=False)  # another recipe reuses no shard
    assert len(committed) == 6


def test_progress_rises_to_one_and_each_shard_is_a_checkpoint(tmp_path: Path):
    source = tiny_llama(tmp_path / "source", shards=3)
    seen: list[float] = []
    checkpoints: list[tuple[str, int]] = []
    context = PassContext(
        header=header_of(source),
        work_dir=tmp_path / "work",
        progress=lambda fraction, _message: seen.append(fraction),
        checkpoint=lambda path, step: checkpoints.append((path, step)),
    )
    MODEL_PASSES["weight-only"](source, tmp_path / "out", WeightOnly(), context)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert [step for _, step in checkpoints] == [1, 2, 3]
    assert all((tmp_path / "work" / path).is_file() for path, _ in checkpoints)


def test_a_damaged_weight_is_named_and_nothing_is_left(tmp_path: Path):
    source = tiny_llama(tmp_path / "source")
    (shard,) = read_shards(source)
    at = next(tensor for tensor in shard.tensors if tensor.name == "model.layers.1.mlp.up_proj.weight")
    with shard.path.open("r+b") as file:
        file.seek(at.offset + 100)
        file.write(b"\xff\x7f" * 2)
    with pytest.raises(NightpressError, match=r"layers\.1\.mlp\.up_proj") as caught:
        press(source, tmp_path / "out", bits=8)
    assert caught.value.code is ErrorCode.NUMERICAL_FAILURE
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tied_head_without_weights_of_its_own_still_loads(tmp_path: Path):
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_tensors(source)
    press(source, tmp_path / "out", bits=8, ignore=[])
    before, after = (logits(folder, AutoModelForCausalLM) for folder in (source, tmp_path / "out"))
    assert float((after - before).norm() / before.norm()) < 0.03


def test_an_ignored_layer_stays_float_and_loads(tmp_path: Path):
    """The targets are patterns for all layer numbers, so a single layer must be ignored by name."""
    source = tiny_llama(tmp_path / "source")
    record = press(source, tmp_path / "out", bits=8, ignore=["re:model\\.layers\\.0\\.mlp\\..*", "lm_head"])
    assert len(record.layers) == 11
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())["quantization_config"]
    assert len(config["ignore"]) == 3
    before, after = (logits(folder, AutoModelForCausalLM) for folder in (source, tmp_path / "out"))
    assert float((after - before).norm() / before.norm()) < 0.03
    assert "model.layers.0.mlp.up_proj.weight" in load_tensors(tmp_path / "out")


@given(
    st.lists(
        st.sampled_from([f"a.layers.{n}.{m}.proj" for n in range(3) for m in "xy"] + ["head", "b.head"]),
        unique=True,
        min_size=1,
    )
)
@settings(max_examples=60)
def test_targets_and_ignore_mean_exactly_what_was_quantized(quantized: list[str]):
    from compressed_tensors.utils.match import match_name

    names = [f"a.layers.{n}.{m}.proj" for n in range(3) for m in "xy"] + ["head", "b.head"]
    kept = [name for name in names if name not in quantized]
    config = quantization_config(dict.fromkeys(quantized, Scheme(8)), kept=kept)
    targets, ignore = config["config_groups"]["group_0"]["targets"], config["ignore"]
    meant = [
        name
        for name in names
        if any(match_name(name, pattern) for pattern in targets)
        and not any(match_name(name, pattern) for pattern in ignore)
    ]
    assert sorted(meant) == sorted(quantized)


def test_the_export_is_the_pressed_folder(tmp_path: Path):
    source = tiny_llama(tmp_path / "source")
    press(source, tmp_path / "pressed", bits=8)
    compressed_tensors.save(tmp_path / "pressed", tmp_path / "out" / "compressed-tensors")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "out" / "compressed-tensors").iterdir()}
    assert saved == {path.name: path.read_bytes() for path in (tmp_path / "pressed").iterdir()}
    assert compressed_tensors.CONSUMER.is_file()


@pytest.mark.parametrize(
    ("options", "model", "says"),
    [
        ({"pass": "weight-only", "bits": 4, "group_size": 128}, "llama", "group_size of 32 or 16"),
        ({"pass": "weight-only"}, "gpt2", "Conv1D"),
        ({"pass": "magnitude", "pattern": "3:7"}, "llama", "does not divide"),
        ({"pass": "magnitude", "pattern": "2:4"}, "gpt2", "Conv1D"),
    ],
)
def test_what_no_loader_reads_is_refused_at_the_plan(llama: Path, options: dict[str, object], model: str, says: str):
    header = header_of(llama).model_copy(update={"model_type": model})
    export = "compressed-tensors" if options["pass"] == "weight-only" else "safetensors"
    with pytest.raises(NightpressError) as caught:
        make_plan(parse_recipe({"name": "r", "passes": [options], "exports": [export]}), header)
    assert caught.value.code is ErrorCode.INVALID_RECIPE
    assert says in str(caught.value)
