"""Families that nothing names: what the passes need of a model is found from the model itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging

from nightpress.core.compress.model import transformers_classes
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.model.skeleton import Skeleton
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.classes import TABLE, why_not_measured
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.possible import possibilities
from tests.folders import load_tensors
from tests.zoo.__main__ import EXPECTED, KINDS, classes_of, try_class
from tests.zoo.cells import Cell, as_floats, pressed, recipe_of
from tests.zoo.models import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

#: Families that were refused by name before anything was looked at.
_ASKED_FOR = [
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "granite",
    "granitemoe",
    "gptj",
    "ernie4_5",
    "exaone4",
    "llama4_text",
    "mamba",
    "mpt",
    "nemotron",
    "olmo2",
    "qwen3_next",
    "smollm3",
    "stablelm",
    "roformer",
    "eurobert",
    "gte",
    "nomic_bert",
    "modernvbert",
    "bart",
    "marian",
    "clip",
    "siglip",
]
_ORDER = {"works": 2, "refused": 1, "fails": 0}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.mark.slow
def test_the_table_of_classes_is_that_of_the_installed_transformers():
    table = json.loads(TABLE.read_bytes())
    if table["transformers"] != transformers.__version__:
        pytest.skip("the table is of another version of transformers")
    assert table == transformers_classes.table()


def _kind_of(model_type: str) -> str:
    order = ("masked language models", "encoder-decoders", "causal language models", "image classifiers")
    of_both = {"bart", "marian"}
    kinds = [kind for kind in order if model_type in classes_of(kind)]
    return "encoder-decoders" if model_type in of_both else kinds[-1] if "causal language models" in kinds else kinds[0]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", _ASKED_FOR)
def test_no_cell_of_a_family_that_people_asked_for_gets_worse(model_type: str):
    kind = _kind_of(model_type)
    found = try_class(model_type, classes_of(kind)[model_type], ["weight-only", "gptq"])
    expected = json.loads(EXPECTED.read_bytes())[kind][model_type]
    assert set(found) == {"inspect", "weight-only", "gptq"}, found
    for name, cell in found.items():
        assert _ORDER[cell.state] >= _ORDER[expected[name][0]], f"{name}: {cell}"


def test_the_bars_hold_in_the_table():
    expected = json.loads(EXPECTED.read_bytes())
    assert set(expected) == set(KINDS) & set(expected)
    rows = [row for row in expected["causal language models"].values() if "built" not in row]
    assert len(rows) > 165
    for cell in ("weight-only", "gptq"):
        works = sum(row[cell][0] == "works" for row in rows)
        assert works >= 0.9 * len(rows), f"{cell}: {works} of {len(rows)}"
    encoders = {
        model_type: row
        for model_type, row in expected["masked language models"].items()
        if "built" not in row and not _is_no_encoder(model_type, row)
    }
    assert len(encoders) > 40
    works = sum("works" in {row["onnx"][0], row["openvino"][0]} for row in encoders.values())
    assert works >= 0.95 * len(encoders), f"dynamic-int8 in a graph: {works} of {len(encoders)}"
    for kind in expected.values():
        for model_type, row in kind.items():
            refused = [why for state, why in (row[name] for name in row if name != "class") if state == "refused"]
            assert all(refused), f"{model_type} is refused without a reason"


def _is_no_encoder(model_type: str, row: dict[str, Any]) -> bool:
    """Whether a class that finds hidden words is an encoder-decoder or sees images: these have graphs of their own kind, or none."""
    beside = any(said in row["onnx"][1] for said in ("without the images", "without the sounds"))
    return beside or model_type in classes_of("encoder-decoders")


@pytest.mark.slow
def test_a_model_without_rows_of_blocks_is_held_whole_and_rounded_as_well(tmp_path: Path):
    """Gemma 4's later blocks may read keys that earlier ones have stored."""
    source = save_tiny("gemma4_text", "Gemma4ForCausalLM", tmp_path / "source")
    skeleton = Skeleton(
        source,
        SourceTensors(read_shards(source)),
        "cpu",
        torch.float32,
        {"input_ids": torch.ones(1, 8, dtype=torch.int64)},
    )
    assert skeleton.whole is not None
    assert len(skeleton.blocks) == 1
    out, changed = pressed(recipe_of("gptq"), source, tmp_path / "work")
    assert changed
    assert as_floats(source, out, tmp_path / "floats", recipe_of("gptq")).exists()


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("mistral3", "Mistral3ForConditionalGeneration"),  # its tower is a Pixtral
        ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    ],
)
@pytest.mark.slow
def test_the_tower_of_a_model_that_sees_is_left_as_it_is(tmp_path: Path, model_type: str, class_name: str):
    source = save_tiny(model_type, class_name, tmp_path / "source")
    out, changed = pressed(recipe_of("gptq"), source, tmp_path / "work")
    before, after = load_tensors(source), load_tensors(out)
    tower = [name for name in before if any(part in name for part in ("vision_tower", "multi_modal", "visual."))]
    assert tower
    assert changed
    assert all(torch.equal(before[name], after[name]) for name in tower)
    assert not set(tower) & set(changed)


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("clip", "CLIPForImageClassification"),  # its config.json has a `vision_config`, and it sees nothing else
        ("clip_vision_model", "CLIPVisionModel"),  # transformers has it among no models of images
    ],
)
@pytest.mark.slow
def test_a_model_of_images_alone_gets_a_graph_that_reads_pixels(model_type: str, class_name: str):
    assert try_class(model_type, class_name, ["onnx"])["onnx"] == Cell("works")


@pytest.mark.parametrize(
    ("model_type", "class_name", "why"),
    [
        ("wav2vec2", "Wav2Vec2Model", "it hears"),
        ("qwen3_vl_vision", "Qwen3VLVisionModel", "what it answers"),  # it reads patches and their grid
        ("siglip", "SiglipModel", "it compares images with texts"),
        ("siglip2", "Siglip2ForImageClassification", "it sees patches"),
    ],
)
def test_a_model_that_reads_no_text_is_not_taken_for_an_embedder_of_texts(model_type: str, class_name: str, why: str):
    assert why in (why_not_measured(class_name, model_type) or [""])[0]
    assert why_not_measured("BertModel", "bert") is None


def test_what_a_model_can_have_is_said_with_the_reason_of_what_it_can_not(tmp_path: Path):
    header = inspect_model(FolderFiles(save_tiny("bloom", "BloomForCausalLM", tmp_path / "source")))
    found = {(each.kind, each.name): each.why_not for each in possibilities(header)}
    assert found["pass", "gptq"] is None
    assert found["pass", "awq"] is None
    assert found["pass", "layers"] is None
    assert found["export", "compressed-tensors" if ("export", "compressed-tensors") in found else "onnx"] is None
    assert "no loader finds the scales" in (found["pass", "kv-cache"] or "")
    assert found["export", "gguf"] is None
    other = inspect_model(FolderFiles(save_tiny("gptj", "GPTJForCausalLM", tmp_path / "other")))
    reasons = {(each.kind, each.name): each.why_not for each in possibilities(other)}
    assert "gpt_neox, granite" in (reasons["export", "gguf"] or "")


@pytest.mark.parametrize(
    ("model_type", "class_name", "why"),
    [
        ("speech_to_text", "Speech2TextForConditionalGeneration", "it hears"),
        ("bart", "BartModel", "an encoder-decoder is measured here by the text"),
        ("bert", "BertForQuestionAnswering", "what it answers can't be measured"),
        ("llama4_text", "Llama4ForCausalLM", "looks for each expert's own weights"),
        ("clip", "CLIPModel", "it compares images with texts"),
    ],
)
def test_what_can_not_be_pressed_is_refused_with_its_own_reason(
    model_type: str, class_name: str, why: str, tmp_path: Path
):
    header = inspect_model(FolderFiles(save_tiny(model_type, class_name, tmp_path / "source")))
    with pytest.raises(NightpressError, match=why) as caught:
        make_plan(recipe_of("weight-only"), header)
    assert caught.value.hint


@pytest.mark.slow
def test_a_class_that_is_not_built_is_told_from_a_cell_that_fails():
    assert try_class("blt", "BltForCausalLM", [])["built"] == Cell(
        "fails", "ValueError: its smallest form has 192,649,344 weights"
    )


def test_a_tensor_that_transformers_merges_from_others_is_named(tmp_path: Path):
    source = save_tiny("olmo_hybrid", "OlmoHybridForCausalLM", tmp_path / "source")
    with pytest.raises(NightpressError, match=r"no tensor .*conv1d\.weight, which the model's class wants"):
        pressed(recipe_of("wanda"), source, tmp_path / "work")
