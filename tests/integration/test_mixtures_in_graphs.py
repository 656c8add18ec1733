"""Mixtures of experts in graphs: every expert reads every token there, and the answers are those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nightpress.core.compress.export import onnx
from nightpress.core.compress.graph.experts import EveryExpert, spread_experts
from nightpress.core.compress.graph.tracing import trace
from nightpress.core.compress.passes import PassContext
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import DynamicInt8
from nightpress.core.recipes.plan import make_plan
from tests.zoo.graphs import examples, in_onnxruntime
from tests.zoo.models import config_for, save_tiny

#: Type → class. They differ in biases, in how a gate is applied, in the order of a weight's dimensions, and in whether there is a gate.
KINDS = {
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelHeader]:
    source = save_tiny("mixtral", KINDS["mixtral"], tmp_path_factory.mktemp("mixtral") / "source")
    return source, inspect_model(FolderFiles(source))


@pytest.mark.parametrize("model_type", KINDS)
def test_experts_with_layers_of_their_own_answer_as_the_fused_ones(model_type: str) -> None:
    torch.manual_seed(0)
    model_class = getattr(transformers, KINDS[model_type])
    config = config_for(model_type, model_class)
    if model_type == "nemotron_h":
        config.layers_block_type = ["moe", "full_attention"]
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, too: as zeros they would hide errors
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(5, 50, (2, 24))
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        spread_experts(model)
        after = model(input_ids=ids, use_cache=False).logits
    assert any(isinstance(module, EveryExpert) for module in model.modules())
    assert float((after - before).norm() / before.norm()) < 1e-5


@pytest.mark.slow
def test_a_graph_answers_as_transformers_does_and_dynamic_int8_rounds_every_expert(
    mixtral: tuple[Path, ModelHeader], tmp_path: Path
) -> None:
    source, header = mixtral
    check = examples(header)
    model = transformers.MixtralForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(check.ids), use_cache=False).logits
    traced = trace(source, header, check, PassContext(header=header, work_dir=tmp_path))

    onnx.save(source, tmp_path / "floats", traced, [], weights="fp32")
    assert _distance(tmp_path / "floats", check.ids, expected) < 1e-4

    (record,) = onnx.save(source, tmp_path / "int8", traced, [(0, DynamicInt8())], weights="fp32")
    assert 1e-4 < _distance(tmp_path / "int8", check.ids, expected) < 0.2
    experts = {f"layers.{block}.mlp.experts.{expert}" for block in range(2) for expert in range(4)}
    rounded = {layer.name for layer in record.layers if layer.bytes_after < layer.bytes_before}
    assert {f"model.{name}.{part}" for name in experts for part in ("gate_up_proj", "down_proj")} <= rounded
    assert not any(name.endswith("mlp.gate") for name in rounded)  # routers stay in float


def _distance(folder: Path, ids: Any, expected: Tensor) -> float:
    return float((torch.from_numpy(in_onnxruntime(folder, ids)) - expected).norm() / expected.norm())


def test_a_plan_says_what_experts_cost_in_a_graph_and_refuses_their_codes(mixtral: tuple[Path, ModelHeader]) -> None:
    _, header = mixtral
    asked = {"name": "r", "passes": [{"pass": "dynamic-int8"}], "exports": ["onnx"], "evaluate": []}
    assert any(
        "every expert reads every token" in warning for warning in make_plan(parse_recipe(asked), header).warnings
    )
    coded = asked | {"passes": [{"pass": "gptq", "bits": 4, "group_size": None}]}
    with pytest.raises(NightpressError, match="their codes fit no product"):
        make_plan(parse_recipe(coded), header)
    plan = make_plan(parse_recipe(coded | {"exports": ["compressed-tensors"]}), header)
    assert not any("every expert" in warning for warning in plan.warnings)
