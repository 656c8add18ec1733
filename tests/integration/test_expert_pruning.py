"""Experts that add least are removed, and transformers loads a smaller mixture that answers as the source does without them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.executors.survey import survey
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30522,
    "bos_token_id": 101,
    "eos_token_id": 102,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
_PARTS = {"num_experts": 8, "moe_intermediate_size": 24}
MIXTURES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 8},
    "Qwen2MoeForCausalLM": {**_PARTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "Qwen3MoeForCausalLM": {**_PARTS, "head_dim": 8, "norm_topk_prob": True},
    "OlmoeForCausalLM": {"num_experts": 8},
}
_USELESS = 5  #: an expert whose outputs are far smaller than those of all others

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    model_class = getattr(transformers, request.param)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**_SHAPE, **MIXTURES[request.param]))
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down_proj"):
            parameter.data *= 30
            parameter.data[_USELESS] *= 1e-3
    model.save_pretrained(folder)
    shutil.copy(bert_tiny / "tokenizer.json", folder)
    return folder


def _context(source: Path, work: Path, **calibration: Any) -> PassContext:
    work.mkdir(parents=True, exist_ok=True)
    chosen = Calibration(**{"samples": 8, "length": 32, **calibration})
    return PassContext(header=inspect_model(FolderFiles(source)), work_dir=work, calibration=chosen)


def _recipe(share: float) -> Any:
    return parse_recipe({"name": "r", "passes": [{"pass": "experts", "share": share}], "exports": ["safetensors"]})


def _load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _answers(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.randint(1000, 20000, (16, 24), generator=torch.Generator().manual_seed(1))).logits
    return logits


def _router(block: Any) -> Any:
    return block.mlp.gate if hasattr(block.mlp, "gate") else block.mlp.router


def _without(source: Path, kept: dict[str, list[int]]) -> Any:
    """The source with these experts alone, cut by hand from the loaded model's fused matrices."""
    whole = _load(source)
    config = transformers.AutoConfig.from_pretrained(source)
    count = len(next(iter(kept.values())))
    for key in ("num_experts", "num_local_experts"):
        if key in json.loads((source / "config.json").read_bytes()):
            setattr(config, key, count)
    smaller = type(whole)(config).eval()
    state = whole.state_dict()
    for layer, block in enumerate(whole.model.layers):
        if not hasattr(block.mlp, "experts"):
            continue
        (numbers,) = (found for prefix, found in kept.items() if f".layers.{layer}." in prefix)
        for name in state:
            at_experts = f"model.layers.{layer}.mlp.experts."
            is_router = state[name] is not None and name.startswith(f"model.layers.{layer}.mlp.gate.")
            if name.startswith(at_experts) or is_router:
                state[name] = state[name][numbers]
    smaller.load_state_dict(state)
    return smaller


def test_a_smaller_mixture_answers_as_the_source_does_without_the_removed_experts(mixture: Path, tmp_path: Path):
    recipe = _recipe(0.25)
    plan = make_plan(recipe, inspect_model(FolderFiles(mixture)))
    context = _context(mixture, tmp_path / "work")
    record = MODEL_PASSES["experts"](mixture, tmp_path / "out", recipe.passes[0], context)
    kept = record.summary["kept"]
    assert kept
    for prefix, numbers in kept.items():
        assert len(numbers) == 6
        assert _USELESS not in numbers
        saliency = record.summary["saliency"][prefix]
        assert min(saliency[at] for at in numbers) >= max(saliency[at] for at in range(8) if at not in numbers)
    torch.testing.assert_close(_answers(_load(tmp_path / "out")), _answers(_without(mixture, kept)))
    written = inspect_model(FolderFiles(tmp_path / "out"))
    planned = recipe.passes[0].leaves(inspect_model(FolderFiles(mixture)))
    assert {tensor.name: tensor for tensor in written.tensors} == {tensor.name: tensor for tensor in planned.tensors}
    assert written.config == planned.config
    assert plan.estimate is not None
    assert plan.estimate.output_bytes["safetensors"] == pytest.approx(written.size, rel=0.02)
    assert record.summary["parameters_after"] == written.parameters < record.summary["parameters_before"]


def test_saliency_is_the_mean_of_the_routers_weight_times_the_outputs_size(mixture: Path, tmp_path: Path):
    context = _context(mixture, tmp_path / "work")
    samples = calibration_samples(mixture, context)
    found = {}
    for block in survey(mixture, samples, context, None):
        found |= block.saliency
    model = _load(mixture)
    expected: dict[int, Tensor] = {}

    def listen(layer: int, experts: Any) -> None:
        def hook(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            hidden, chosen, weights = (*args, *kwargs.values())
            sums, counts = torch.zeros(8), torch.zeros(8)
            for token in range(len(hidden)):
                for place, expert in enumerate(chosen[token].tolist()):
                    gate, up = F.linear(hidden[token], experts.gate_up_proj[expert]).chunk(2)
                    output = F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
                    sums[expert] += float(weights[token, place]) * float(output.norm())
                    counts[expert] += 1
            expected[layer] = sums / counts.clamp(min=1)

        experts.register_forward_pre_hook(hook, with_kwargs=True)

    for layer, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "experts"):
            listen(layer, block.mlp.experts)
    with torch.no_grad():
        model(samples["input_ids"])
    assert len(found) == len(expected)
    for prefix, saliency in found.items():
        layer = int(prefix.split(".")[2])
        torch.testing.assert_close(saliency.float(), expected[layer], rtol=1e-3, atol=1e-6)


def test_padding_does_not_count(mixture: Path, tmp_path: Path):
    context = _context(mixture, tmp_path / "work")
    ids = calibration_samples(mixture, context)["input_ids"]
    padded = F.pad(ids, (0, 16))
    mask = F.pad(torch.ones_like(ids), (0, 16))
    plain = [block.saliency for block in survey(mixture, {"input_ids": ids}, context, None)]
    with_padding = [
        block.saliency for block in survey(mixture, {"input_ids": padded, "attention_mask": mask}, context, None)
    ]
    for ours, theirs in zip(plain, with_padding, strict=True):
        assert ours.keys() == theirs.keys()
        for prefix in ours:
            torch.testing.assert_close(ours[prefix], theirs[prefix], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("share", "reason"), [(0.9, "each token goes to 2"), (0.05, "would change nothing")])
def test_a_share_that_leaves_too_few_or_all_is_refused_when_planned(share: float, reason: str, mixture: Path):
    with pytest.raises(NightpressError, match=reason):
        make_plan(_recipe(share), inspect_model(FolderFiles(mixture)))


def test_a_dense_model_is_refused_when_planned(bert_tiny: Path):
    with pytest.raises(NightpressError, match="no experts with tensors of their own"):
        make_plan(_recipe(0.25), inspect_model(FolderFiles(bert_tiny)))
