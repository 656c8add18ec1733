"""Every family with every stored form of quantized weights: transformers loads the result, or the plan refuses it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import save_file
from transformers.utils import logging

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import compressed_tensors
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.grids.stored import from_tensors
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import Quantizing
from nightpress.core.recipes.plan import make_plan
from tests.every_family import FAMILIES, family_answers, save_family
from tests.folders import load_tensors

_INT4 = {"pass": "weight-only", "bits": 4, "group_size": 32}
#: form → (passes, largest relative distance from the outputs of a float model with the dequantized weights). Rounded activations change
#: the outputs, and much if they change a router's choice. With wrong weights the distance is more than 1.
FORMS: dict[str, tuple[list[dict[str, Any]], float]] = {
    "int8": ([{"pass": "weight-only"}], 1e-4),
    "int4": ([_INT4], 1e-4),
    "int4, zero points": ([_INT4 | {"symmetric": False}], 1e-4),
    "int4 and int8": ([_INT4 | {"overrides": {"re:.*1\\..*": {"bits": 8}}}], 1e-4),
    "int8, embeddings": ([{"pass": "weight-only", "embeddings": True}], 1e-4),
    "fp8 weights": ([{"pass": "weight-only", "format": "fp8"}], 1e-4),
    #: the loader unpacks fp4 to bfloat16
    "mxfp4": ([{"pass": "weight-only", "format": "mxfp4"}], 0.05),
    "nvfp4": ([{"pass": "weight-only", "format": "nvfp4"}], 0.05),
    "fp8": ([{"pass": "fp8"}], 0.2),
    "fp8, a scale a tensor": ([{"pass": "fp8", "weights": "tensor"}], 0.2),
    "fp8, blocks": ([{"pass": "fp8", "weights": "block"}], 0.2),
    "fp8, static": ([{"pass": "fp8", "activations": "static"}], 0.2),
    "int8 activations": ([{"pass": "smoothquant", "alpha": 0.0}], 0.4),
    "int8 activations, static": ([{"pass": "smoothquant", "alpha": 0.0, "activations": "tensor"}], 0.4),
    "cache": ([{"pass": "kv-cache"}], 0.1),
    "int8 cache, then int4": ([{"pass": "kv-cache", "format": "int8"}, _INT4], 0.1),
}
#: Families whose models have the modules and names of another family here, and differ in their arithmetic. Of four of them, each has another
#: quarter of the forms. All other families have all forms.
_SIBLINGS = (
    *("roberta", "xlm-roberta", "camembert", "electra"),  # of bert
    *("qwen2", "qwen3", "mistral", "starcoder2"),  # of llama
    *("gemma", "gemma2"),  # of gemma3_text
)
_FAMILIES_WITH_FORMS = [
    (family, form)
    for family in FAMILIES
    for at, form in enumerate(FORMS)
    if family not in _SIBLINGS or at % 4 == _SIBLINGS.index(family) % 4
]
_HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification")
_OF_HEADS = ("int8", "int4, zero points", "int8 activations")
#: Each family has each head and each of these forms, and each head has each form.
_FAMILIES_WITH_HEADS = [
    (family, head, _OF_HEADS[(number + at) % len(_OF_HEADS)])
    for number, family in enumerate(family for family in FAMILIES if family != "vit")
    for at, head in enumerate(_HEADS)
]

# torch warns that it will remove a dtype that transformers uses for the scales.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a family's model, once for all tests. They don't change it."""
    root = tmp_path_factory.mktemp("sources")

    def source(family: str) -> Path:
        return root / family if (root / family).exists() else save_family(family, root / family)

    return source


def _recipe(passes: list[dict[str, Any]]) -> Any:
    return parse_recipe({"name": "r", "passes": passes, "exports": ["compressed-tensors"], "evaluate": []})


def _press(source: Path, work: Path, passes: list[dict[str, Any]]) -> Path:
    recipe, folder = _recipe(passes), source
    calibration = Calibration(samples=8, length=32, dtype="float32")
    (work / "work").mkdir(parents=True)
    for index, options in enumerate(recipe.passes):
        header = inspect_model(FolderFiles(folder))
        context = PassContext(header=header, work_dir=work / "work", index=index, calibration=calibration)
        MODEL_PASSES[options.pass_](folder, work / str(index), options, context)
        folder = work / str(index)
    compressed_tensors.save(folder, work / "out")
    return work / "out"


def _as_floats(source: Path, out: Path, folder: Path, last: Any) -> Path:
    """Save the source with the dequantized weights of `out`, in float: the model that a loader should get."""
    written, floats = load_tensors(out), load_tensors(source)
    for name in floats:
        module = name.removesuffix(".weight")
        if isinstance(last, Quantizing) and f"{name}_scale" in written:
            floats[name] = from_tensors(name, last.scheme(module), written)
        else:
            floats[name] = written[name]
    folder.mkdir()
    save_file(floats, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def _refusal(passes: list[dict[str, Any]], source: Path) -> NightpressError | None:
    try:
        make_plan(_recipe(passes), inspect_model(FolderFiles(source)))
    except NightpressError as error:
        return error
    return None


def _check(class_name: str, source: Path, work: Path, form: str) -> None:
    """Check that a form loads and gives the right outputs, or that the plan refuses it with a hint."""
    passes, bound = FORMS[form]
    if (refused := _refusal(passes, source)) is not None:
        assert refused.code in {ErrorCode.INVALID_RECIPE, ErrorCode.UNSUPPORTED_ARCHITECTURE}
        assert refused.hint
        return
    out = _press(source, work, passes)
    floats = _as_floats(source, out, work / "floats", _recipe(passes).passes[-1])
    found, expected = family_answers(class_name, out), family_answers(class_name, floats)
    assert float((found - expected).norm() / expected.norm()) < bound


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), _FAMILIES_WITH_FORMS)
def test_a_form_loads_with_the_right_answer_or_is_refused_when_planned(
    family: str, form: str, sources: Callable[[str], Path], tmp_path: Path
):
    class_name, _ = FAMILIES[family]
    _check(class_name, sources(family), tmp_path / "pressed", form)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head", "form"), _FAMILIES_WITH_HEADS)
def test_other_heads_of_a_family_load_as_well(family: str, head: str, form: str, tmp_path: Path):
    class_name = re.sub(r"(ForMaskedLM|ForCausalLM|LMHeadModel|ForConditionalGeneration)$", head, FAMILIES[family][0])
    # Without "Text", the class is a vision model with billions of parameters.
    class_name = re.sub(r"^Gemma3(?!Text)", "Gemma3Text", class_name)
    if not hasattr(transformers, class_name):
        pytest.skip("transformers has no such class")
    _check(class_name, save_family(family, tmp_path / "source", class_name=class_name), tmp_path / "pressed", form)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *((family, form) for family in ("falcon", "gpt_bigcode", "modernbert") for form in ("int8", "int4")),
        ("opt", "cache"),
        ("opt", "int8 cache, then int4"),
    ],
)
def test_forms_that_load_with_help_are_not_refused(family: str, form: str, sources: Callable[[str], Path]):
    header = inspect_model(FolderFiles(sources(family)))
    make_plan(_recipe(FORMS[form][0]), header)


_BUDGET = {"pass": "gptq", "group_size": 32, "budget": 6.0}


@pytest.mark.parametrize(
    ("family", "pass_", "why"),
    [
        ("falcon", FORMS["int4 and int8"][0][0], "one grid alone of a falcon"),
        ("t5", _BUDGET, "one grid alone of a t5"),
        ("modernbert", _BUDGET, "one grid alone of a modernbert"),
        ("mixtral", _BUDGET, "one grid alone for all experts"),
        ("mixtral", _INT4 | {"ignore": ["re:.*experts.*"]}, "experts for codes, and .* stays in float"),
        ("olmoe", _INT4 | {"ignore": ["re:.*experts\\.1\\..*"]}, "experts for codes, and .* stays in float"),
        ("mixtral", {"pass": "fp8", "weights": "block"}, "can't by one for 128 × 128"),
        ("qwen3_moe", {"pass": "kv-cache"}, "experts for codes, and they stay in float"),
    ],
)
def test_what_transformers_could_not_load_is_refused_with_the_reason(
    family: str, pass_: dict[str, Any], why: str, sources: Callable[[str], Path]
):
    header = inspect_model(FolderFiles(sources(family)))
    with pytest.raises(NightpressError, match=why) as caught:
        make_plan(_recipe([pass_]), header)
    assert caught.value.code == ErrorCode.INVALID_RECIPE


def test_half_an_encoder_decoder_is_refused_when_planned(tmp_path: Path):
    header = inspect_model(
        FolderFiles(save_family("t5", tmp_path / "source", class_name="T5ForSequenceClassification"))
    )
    with pytest.raises(NightpressError, match="T5ForSequenceClassification") as caught:
        make_plan(_recipe(FORMS["int8"][0]), header)
    assert caught.value.code == ErrorCode.UNSUPPORTED_ARCHITECTURE
    assert "ForConditionalGeneration" in caught.value.hint


def test_a_mixtures_experts_may_stay_in_float_beside_fp8(tmp_path: Path):
    source = save_family("mixtral", tmp_path / "source")
    passes = [{"pass": "fp8", "ignore": ["re:.*experts.*"]}]
    make_plan(_recipe(passes), inspect_model(FolderFiles(source)))
    out = _press(source, tmp_path / "pressed", passes)
    before, after = (family_answers("MixtralForCausalLM", folder) for folder in (source, out))
    assert 0 < float((after - before).norm() / before.norm()) < 0.2


def test_zero_points_of_a_layer_with_few_outputs_are_refused(tmp_path: Path):
    source = save_family("bert", tmp_path / "source", class_name="BertForSequenceClassification")
    header = inspect_model(FolderFiles(source))
    with pytest.raises(NightpressError, match=r"zero points of classifier\.weight, which has only 2 outputs"):
        make_plan(_recipe([_INT4 | {"symmetric": False, "ignore": []}]), header)


def test_a_decoders_head_over_classes_stays_in_float(tmp_path: Path):
    source = save_family("llama", tmp_path / "source", class_name="LlamaForSequenceClassification")
    assert "score.weight" in load_tensors(_press(source, tmp_path / "pressed", [_INT4]))


@pytest.mark.slow
def test_what_does_not_load_is_said_with_its_cause(tmp_path: Path):
    """The test skips the plan, which would refuse this recipe."""
    source = save_family("bert", tmp_path / "source", class_name="BertForSequenceClassification")
    recipe = _recipe([_INT4 | {"symmetric": False, "ignore": []}])
    header = inspect_model(FolderFiles(source))
    out = _press(source, tmp_path / "pressed", [_INT4 | {"symmetric": False, "ignore": []}])
    trial = quality.prepare(recipe, header, source, {}, threads=1)
    with pytest.raises(NightpressError, match=r"classifier\.weight could not be read: .*stride") as caught:
        run_consumer(compressed_tensors.CONSUMER, out, trial.task, name="it", scratch=tmp_path / "scratch")
    assert caught.value.code == ErrorCode.VERIFICATION_FAILED
    assert "version" not in caught.value.hint
