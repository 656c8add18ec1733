"""`learned-rounding` from a model's folder to one that transformers loads, with real weights and the built-in prose."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from nightpress.core.compress.calibration.samples import model_inputs
from nightpress.core.compress.data.rows import read_rows
from nightpress.core.compress.data.tokenized import open_tokenizer, text_windows
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs, press_blocks
from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.grids.stored import from_tensors, round_weight, to_tensors
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.compress.passes.learned_rounding import SHARE, Learned
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import LearnedRounding
from nightpress.core.recipes.plan import make_plan
from tests.block_models import context_of, linears_of, samples_of, save_model, token_ids
from tests.integration.test_decoder_exports import save_llama
from tests.press import lay_out, press

# torch warns that it will remove a dtype that transformers uses for the scales.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _press(source: Path, work: Path, pass_: dict[str, Any], told: list[float] | None = None) -> Path:
    recipe = parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]})
    context = PassContext(
        header=inspect_model(FolderFiles(source)),
        work_dir=work / "work",
        calibration=Calibration(samples=32, length=48),
        progress=lambda done, _message: told.append(done) if told is not None else None,
    )
    (work / "work").mkdir(parents=True)
    MODEL_PASSES[pass_["pass"]](source, work / "out", recipe.passes[0], context)
    return work / "out"


@pytest.fixture(scope="module")
def held_out(bert_tiny: Path) -> Tensor:
    """Tokens [16, 48] of the prose that calibrates nothing."""
    rows = read_rows("builtin:prose", None)
    return torch.from_numpy(
        text_windows(rows, open_tokenizer(bert_tiny), samples=16, length=48, ref="builtin:prose").ids
    )


@torch.no_grad()
def _answers(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: Tensor = model(input_ids=ids).logits
    return logits.log_softmax(-1)


@pytest.mark.parametrize("options", [{"bits": 2, "group_size": 32}, {"bits": 3, "group_size": 64, "symmetric": False}])
@pytest.mark.slow
def test_it_diverges_less_than_gptq_on_text_that_calibrated_nothing(
    options: dict[str, Any], bert_tiny: Path, held_out: Tensor, tmp_path: Path
):
    source = _answers(bert_tiny, held_out)

    def divergence(name: str, **more: Any) -> float:
        found = _answers(_press(bert_tiny, tmp_path / name, {"pass": name, **options, **more}), held_out)
        return float((source.exp() * (source - found)).sum(-1).mean())

    assert divergence("learned-rounding", steps=60) < 0.9 * divergence("gptq")


def _method(options: LearnedRounding) -> Learned:
    return Learned(options, options.scheme, largest=1.0, seed=0)


class _Judged:
    """Rounds to nearest, or as learned, and notes the error of each block's output over all batches."""

    by_group = False

    def __init__(self, options: LearnedRounding, learns: bool) -> None:
        self._options, self._learned = options, _method(options) if learns else None
        self.errors: list[float] = []

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(self, block: LiveBlock, inputs: Any, device: torch.device) -> dict[str, FinalTensor]:
        settled = self._nearest(block, inputs) if self._learned is None else self._learned.settle(block, inputs, device)
        assert block.lessons is not None
        for name, tensor in settled.items():
            block.lessons.put(name, tensor.weight)
        self.errors.append(sum(float(block.lessons.squared_error(at)) for at in range(block.lessons.batches)))
        return settled

    def restore(self, name: str, written: Any) -> Tensor:
        return from_tensors(name, self._options.scheme(name.removesuffix(".weight")), written)

    def _nearest(self, block: LiveBlock, inputs: list[Inputs]) -> dict[str, FinalTensor]:
        settled = {}
        for group in inputs:
            assert isinstance(group.statistic, Gram)
            for name in group.names:
                scheme = self._options.scheme(name.removesuffix(".weight"))
                power = group.statistic.matrix().diagonal()
                coded = round_weight(
                    block[name].float(), scheme, block[name].dtype, ranges="least-error", importance=power, largest=1.0
                )
                tensors = to_tensors(name, scheme, coded)
                settled[name] = FinalTensor(from_tensors(name, scheme, tensors), tensors, None)
        return settled


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("LlamaForCausalLM", {"bits": 2, "group_size": 16, "start": "better"}),
        ("LlamaForCausalLM", {"bits": 8, "group_size": None}),
        ("LlamaForCausalLM", {"format": "nvfp4"}),
        ("MixtralForCausalLM", {"bits": 3, "group_size": 16}),
        ("AlbertForMaskedLM", {"bits": 3, "group_size": 16, "symmetric": False}),
        ("T5ForConditionalGeneration", {"bits": 3, "group_size": 16, "symmetric": False}),
        ("ViTForImageClassification", {"format": "mxfp4"}),
    ],
)
@pytest.mark.slow
def test_no_blocks_output_is_worse_than_with_plain_rounding(family: str, options: dict[str, Any], tmp_path: Path):
    """With few batches, the batches that judge are those that teach. So what was chosen by them must hold here."""
    source = tmp_path / "source"
    save_model(family, source)
    parsed = LearnedRounding(steps=10, batch=2, **options)
    samples = samples_of(family, token_ids())
    errors = []
    for learns in (False, True):
        method = _Judged(parsed, learns)
        context = context_of(source, tmp_path / str(learns) / "work")
        chosen = linears_of(source)
        press_blocks(
            source, tmp_path / str(learns) / "out", method, samples, context, chosen=chosen, recipe="r", step=2
        )
        errors.append(method.errors)
    plain, learned = errors
    # Only the first blocks get the same inputs: later ones get what the settled blocks pass on.
    assert learned[0] <= plain[0] * (1 + 1e-6)
    assert learned[-1] < plain[-1] * 1.2


@pytest.mark.slow
def test_texts_padding_changes_no_errors(tmp_path: Path):
    source = tmp_path / "source"
    save_model("LlamaForCausalLM", source)
    ids = token_ids(4, 12)
    header = ModelHeader(model_type="x", architecture="LlamaForCausalLM", config={}, tensors=(), has_tokenizer=False)
    padded = torch.cat([ids, torch.full((4, 20), 2)], 1)
    mask = torch.cat([torch.ones(4, 12), torch.zeros(4, 20)], 1).long()
    errors = []
    for name, samples in {"plain": model_inputs(ids, header), "padded": model_inputs(padded, header, mask)}.items():
        method = _Judged(LearnedRounding(bits=3, group_size=16, steps=10), learns=False)
        out, context = tmp_path / name / "out", context_of(source, tmp_path / name / "work")
        press_blocks(source, out, method, samples, context, chosen=linears_of(source), recipe="r", step=2)
        errors.append(method.errors)
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
@pytest.mark.slow
def test_an_attempt_killed_after_a_block_ends_with_the_same_bytes(family: str, tmp_path: Path):
    source = tmp_path / "source"
    save_model(family, source)
    options = LearnedRounding(bits=3, group_size=16, steps=10, batch=2)
    samples = samples_of(family, token_ids())

    def run(name: str, **extra: Any) -> Any:
        out, context = tmp_path / name / "out", context_of(source, tmp_path / name / "work", "auto", **extra)
        method, chosen = _method(options), linears_of(source)
        return press_blocks(source, out, method, samples, context, chosen=chosen, recipe="r", step=2)

    whole = run("a")

    def kill(_path: str, step: int) -> None:
        if step == 2:
            raise _KilledError

    with pytest.raises(_KilledError):
        run("b", checkpoint=kill)
    assert not (tmp_path / "b" / "out" / "model.safetensors.index.json").exists()
    assert run("b") == whole
    assert list(whole.figures[SHARE]) == list(range(len(whole.figures[SHARE])))
    files = sorted((tmp_path / "a" / "out").iterdir())
    assert [path.name for path in files] == sorted(path.name for path in (tmp_path / "b" / "out").iterdir())
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / "out" / path.name).read_bytes(), path.name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_two_runs_leave_the_same_bytes_and_learn(dtype: torch.dtype, tmp_path: Path):
    source = tmp_path / "source"
    save_model("LlamaForCausalLM", source).to(dtype).save_pretrained(source)
    options = LearnedRounding(bits=3, group_size=16, steps=40, batch=2)
    samples, chosen = {"input_ids": token_ids(32, 48)}, linears_of(source)
    for name in "ab":
        context = context_of(source, tmp_path / name / "work", "auto", device="cuda")
        out = tmp_path / name / "out"
        done = press_blocks(source, out, _method(options), samples, context, chosen=chosen, recipe="r", step=2)
        assert done.figures[SHARE][0] < 0.9
    for path in (tmp_path / "a" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "out" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_it_tells_its_progress_within_a_block(bert_tiny: Path, tmp_path: Path):
    told: list[float] = []
    _press(bert_tiny, tmp_path, {"pass": "learned-rounding", "group_size": 64, "steps": 10}, told)
    assert told == sorted(told)
    assert sum(0 < done < 0.5 for done in told) >= 9
    assert sum(0.5 < done < 1 for done in told) >= 9


@pytest.mark.parametrize(
    ("pass_", "says"),
    [
        ({"group_size": 100}, "group_size"),
        ({"format": "nvfp4", "symmetric": False}, "zero points"),
        ({"format": "nvfp4", "group_size": 32}, "leave it out"),
        ({"format": "mxfp4", "budget": 4.5}, "budget"),
        ({"steps": 1}, "steps"),
        ({"activations": "fp4"}, "fp4 weights"),
        ({"format": "nvfp4", "activations": "fp8"}, "no scheme"),
    ],
)
def test_what_cannot_work_is_refused_before_it_runs(pass_: dict[str, Any], says: str, bert_tiny: Path):
    recipe = {"name": "r", "passes": [{"pass": "learned-rounding", **pass_}], "exports": ["compressed-tensors"]}
    with pytest.raises(NightpressError, match=says):
        make_plan(parse_recipe(recipe), inspect_model(FolderFiles(bert_tiny)))


@pytest.mark.parametrize("exports", [["compressed-tensors", "onnx", "openvino"], ["gguf"]])
@pytest.mark.slow
def test_every_export_that_carries_it_is_loaded_by_its_consumer(exports: list[str], tmp_path: Path):
    if "gguf" in exports:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    blocks = 2 if "gguf" in exports else 1  # a trace takes long
    source = save_llama(tmp_path / "source", num_hidden_layers=blocks)
    recipe = {
        "passes": [{"pass": "learned-rounding", "group_size": 32, "steps": 10, "batch": 2}],
        "exports": exports,
        "calibration": {"samples": 4, "length": 32},
        "evaluate": [],
    }
    manifest, report, _ = press(lay_out(tmp_path / "job", source, recipe))
    assert [artifact.format for artifact in manifest.artifacts] == exports
    assert all(artifact.verification is not None and artifact.verification.passed for artifact in report.artifacts)
    (pressed,) = report.passes
    assert pressed.summary["steps"] == 10
    assert len(pressed.layers) == 7 * blocks
    (errors,) = pressed.series
    assert errors.x == tuple(range(1, blocks + 1))
    assert all(0 < share <= 1 for share in errors.y)
