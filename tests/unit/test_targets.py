"""A target fills in what a recipe leaves out and refuses what doesn't run on it. `auto` is decided before anything is stored."""

from typing import Any

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.builtins import get_recipe
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.models import aim, parse_recipe
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.targets import AIMS


def header(model_type: str, architecture: str, *, width: int = 64, blocks: int = 2) -> ModelHeader:
    tensors = [
        TensorInfo(name=f"layers.{at}.mlp.up_proj.weight", dtype="BF16", shape=(width, width), size=2 * width * width)
        for at in range(blocks)
    ]
    config = {"hidden_size": width, "num_attention_heads": 2, "vocab_size": 100}
    return ModelHeader(
        model_type=model_type, architecture=architecture, config=config, tensors=tuple(tensors), has_tokenizer=True
    )


def exports_of(target: str) -> tuple[Export, ...]:
    return tuple(Export.model_validate(export) for export in AIMS[target].exports)


LLAMA, BERT = header("llama", "LlamaForCausalLM"), header("bert", "BertModel")


@pytest.mark.parametrize("name", AIMS)
def test_a_target_alone_is_a_whole_recipe_and_reads_back_as_itself(name: str):
    recipe = parse_recipe({"name": "r", "target": name})
    assert recipe.passes
    assert recipe.exports == exports_of(name)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def test_what_a_person_names_stays_and_the_rest_is_filled_in():
    recipe = parse_recipe({"name": "r", "target": "cpu-llm", "passes": [{"pass": "awq"}]})
    assert [options.pass_ for options in recipe.passes] == ["awq"]
    assert recipe.exports == exports_of("cpu-llm")
    # The recipe's own default: the target's calibration belongs to the target's passes.
    assert recipe.calibration.samples == 128
    assert parse_recipe({"name": "r", "target": "cpu-llm", "passes": []}).passes == ()
    named = parse_recipe({"name": "r", "target": "cpu-encoder", "exports": ["openvino"]})
    assert [export.name for export in named.exports] == ["openvino"]
    assert named.passes


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"target": "cpu-encoder", "exports": ["gguf"]}, "runs onnx and openvino, not gguf"),
        ({"target": "gpu-vllm", "exports": ["compressed-tensors", "onnx"]}, "not onnx"),
        ({"target": "auto", "passes": [{"pass": "weight-only"}]}, "chooses the passes"),
        ({"target": "auto", "exports": ["onnx"]}, "chooses the passes"),
        ({"target": "toaster"}, "cpu-llm"),
        ({"exports": ["onnx"]}, "`target`"),
        ({"passes": []}, "`target`"),
    ],
)
def test_what_contradicts_a_target_is_refused_with_a_reason(raw: dict[str, Any], said: str):
    with pytest.raises(NightpressError) as caught:
        parse_recipe({"name": "r", **raw})
    assert caught.value.code is ErrorCode.INVALID_RECIPE
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (LLAMA, "cpu-llm"),
        (header("llama", "LlamaForCausalLM", width=2**16, blocks=2), "gpu-vllm"),
        (header("phi3", "Phi3ForCausalLM"), "gpu-vllm"),
        (BERT, "cpu-encoder"),
        (header("roberta", "RobertaForSequenceClassification"), "cpu-encoder"),
        (header("vit", "ViTForImageClassification"), "cpu-encoder"),
        (header("marian", "MarianMTModel"), "cpu-encoder"),
        (header("whisper", "WhisperForConditionalGeneration"), "cpu-encoder"),
    ],
)
def test_auto_goes_by_the_model(model: ModelHeader, target: str):
    recipe = parse_recipe({"name": "r", "target": "auto", "seed": 3})
    decided = aim(parse_recipe(recipe.model_dump(mode="json")), model)
    assert decided.target == target
    assert decided.exports == exports_of(target)
    assert decided.seed == 3


def test_auto_says_that_it_waits_for_a_model_and_which_it_cannot_take():
    plan = make_plan(get_recipe("auto"))
    assert "name one" in plan.warnings[0]
    with pytest.raises(NightpressError, match="no target for a ViTModel"):
        aim(get_recipe("auto"), header("vit", "ViTModel"))


@pytest.mark.parametrize(
    ("target", "model", "other"), [("cpu-llm", BERT, "cpu-encoder"), ("cpu-encoder", LLAMA, "cpu-llm")]
)
def test_a_target_for_another_kind_of_model_is_refused(target: str, model: ModelHeader, other: str):
    with pytest.raises(NightpressError) as caught:
        make_plan(get_recipe(target), model)
    assert caught.value.code is ErrorCode.INVALID_RECIPE
    assert other in caught.value.hint


def test_the_plan_holds_what_auto_came_to():
    plan = make_plan(get_recipe("auto"), LLAMA)
    assert plan.recipe.target == "cpu-llm"
    assert [(step.kind, step.name) for step in plan.steps][:2] == [("pass", "gptq"), ("export", "gguf-q8_0")]
