"""The blocks executor on small models of every family: the inputs that it observes, its output, and resuming after a kill."""

import gc
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from nightpress.core.compress.executors.blocks import FinalTensor, Inputs, press_blocks
from nightpress.core.compress.executors.blocks.forward import ForwardPass
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.model.families import FOLDS
from nightpress.core.compress.passes.activations import RoundedInputs
from nightpress.core.compress.passes.calibrated import ActivationAware, Quantized, Sparse, WeightAndActivation
from nightpress.core.compress.solvers.wanda import Power
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import Awq, Fp8, Gptq, SmoothQuant, SparseGpt, Wanda
from tests.block_models import FAMILIES, Scaled, context_of, linears_of, samples_of, save_model, token_ids


class _Looks:
    """A method that observes the inputs of layers and leaves every weight unchanged."""

    def __init__(self, by_group: bool = False) -> None:
        self.by_group = by_group
        self.seen: dict[str, Power] = {}

    def watch(self, columns: int, device: torch.device) -> Power:
        return Power(columns, device)

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        for group in inputs:
            assert isinstance(group.statistic, Power)
            self.seen |= dict.fromkeys(group.names, group.statistic)
        weights = {name: block[name].to(device) for group in inputs for name in group.names}
        return {
            name: FinalTensor(weight=weight, tensors={name: weight}, effect=Effect())
            for name, weight in weights.items()
        }

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


class _WholeModel:
    """Σ x² over the inputs of every matrix of a whole model, found independently of the executor, its hooks and the layers' names."""

    def __init__(self, model: Any) -> None:
        self.sums: list[tuple[Tensor, Tensor]] = []  #: (matrix as stored in the file, Σ x² of its inputs)
        self.everyone: list[
            tuple[Tensor, Tensor]
        ] = []  #: the same for experts' matrices, as if all tokens went through each expert
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
                module.register_forward_pre_hook(lambda layer, args: self._add(self.sums, layer.weight, args[0]))
            elif type(module).__name__.endswith("Experts"):
                module.register_forward_pre_hook(self._add_experts)

    def of(self, matrix: Tensor, *, everyone: bool) -> Tensor:
        found = [sum_ for weight, sum_ in (self.everyone if everyone else self.sums) if torch.equal(weight, matrix)]
        return torch.stack(found).sum(0)

    def _add(self, to: list[tuple[Tensor, Tensor]], weight: Tensor, inputs: Tensor) -> None:
        to.append((weight, inputs.reshape(-1, inputs.shape[-1]).square().sum(0)))

    def _add_experts(self, module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, _ = args
        for number in range(module.num_experts):
            for to, rows in ((self.sums, (chosen == number).any(1)), (self.everyone, slice(None))):
                given = hidden[rows]
                gate, up = module.gate_up_proj[number].chunk(2)
                self._add(to, gate, given)
                self._add(to, up, given)
                self._add(to, module.down_proj[number], module.act_fn(given @ gate.T) * (given @ up.T))


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_seen_with_the_inputs_it_has_in_the_whole_model(family: str, in_turn: bool, tmp_path: Path):
    model = save_model(family, tmp_path / "source", layers=2)
    looks, samples = _Looks(by_group=in_turn), samples_of(family, token_ids())
    chosen = linears_of(tmp_path / "source")
    pressed = press_blocks(
        tmp_path / "source",
        tmp_path / "out",
        looks,
        samples,
        context_of(tmp_path, tmp_path / "work"),
        chosen=chosen,
        recipe="look",
    )
    whole = _WholeModel(model)
    with torch.no_grad():
        model(**samples, **({"use_cache": False} if "vocab_size" in FAMILIES[family] else {}))
    before, after = load_file(tmp_path / "source" / "model.safetensors"), _load(tmp_path / "out")
    assert len(looks.seen) >= 6
    assert {name for name in chosen if any(part.isdigit() for part in name.split("."))} == set(looks.seen)
    for name, power in looks.seen.items():
        expected = whole.of(before[name], everyone=name in pressed.undersampled)
        torch.testing.assert_close(
            power.sum, expected, rtol=3e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert pressed.unseen == ()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_with_instructions_for_bfloat16_sees_nearly_the_same_unless_float32_is_asked_for(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("nightpress.core.compress.executors.blocks.plan.multiplies_bfloat16", lambda: True)
    save_model(family, tmp_path / "source")
    seen = {}
    for dtype in ("auto", "float32"):
        looks, context = _Looks(by_group=True), context_of(tmp_path, tmp_path / "work", dtype)
        chosen, samples = linears_of(tmp_path / "source"), samples_of(family, token_ids())
        press_blocks(tmp_path / "source", tmp_path / dtype, looks, samples, context, chosen=chosen, recipe="look")
        seen[dtype] = torch.cat([item.sum for item in looks.seen.values()])
    assert not torch.equal(seen["auto"], seen["float32"])
    distance = (seen["auto"] - seen["float32"]).norm() / seen["float32"].norm()
    assert distance < 0.02


def _load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _header(model_type: str, family: str) -> ModelHeader:
    return ModelHeader(
        model_type=model_type, architecture=family, config=FAMILIES[family], tensors=(), has_tokenizer=False
    )


@pytest.mark.parametrize("model_type", sorted(FOLDS))
@pytest.mark.slow
def test_awq_leaves_the_function_as_it_is_but_for_rounding(model_type: str, tmp_path: Path):
    """With 8 bits and groups of 16 the rounding error is small. A larger difference would mean that a factor was applied wrongly."""
    family = next(
        name
        for name in FAMILIES
        if name.lower().removesuffix("forcausallm") == model_type.removesuffix("_text").replace("_", "")
    )
    model = save_model(family, tmp_path / "source", layers=2)
    source, out, again = tmp_path / "source", tmp_path / "out", tmp_path / "again"
    options = Awq(bits=8, group_size=16)
    method = ActivationAware(options, options.scheme, _header(model_type, family))
    press_blocks(
        source,
        out,
        method,
        {"input_ids": token_ids()},
        context_of(source, tmp_path / "work"),
        chosen=linears_of(source),
        recipe="awq",
    )
    written = _load(out)
    state = {}
    for name in load_file(source / "model.safetensors"):
        state[name] = written[name] if name in written else method.restore(name, written)
    before = load_file(source / "model.safetensors")
    assert any("norm" in name and not torch.equal(before[name], tensor) for name, tensor in state.items())
    again.mkdir()
    shutil.copy(source / "config.json", again)
    save_file(state, again / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        expected = model(input_ids=token_ids()).logits
        found = type(model).from_pretrained(again)(input_ids=token_ids()).logits
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("family", [name for name in FAMILIES if "Moe" in name or "moe" in name or "Mixtral" in name])
@pytest.mark.slow
def test_a_mixture_whose_layers_exchanged_factors_answers_as_before(family: str, tmp_path: Path):
    """Nothing is rounded, so the router chooses the same experts, and each expert gives the same outputs."""
    model = save_model(family, tmp_path / "source")
    source, out = tmp_path / "source", tmp_path / "out"
    method = Scaled(_header(model.config.model_type, family))
    samples, context = {"input_ids": token_ids()}, context_of(source, tmp_path / "work")
    press_blocks(source, out, method, samples, context, chosen=linears_of(source), recipe="scaled")
    kept = {name for name in method.scaled if "experts" in name or name.endswith("gate.weight")}
    experts = {name for name in _load(source) if "experts" in name or name.endswith("gate.weight")}
    assert kept == experts  # all experts, and their routers
    shutil.copy(source / "config.json", out)
    scaled = type(model).from_pretrained(out)
    for which in (model, scaled):
        which.double().set_experts_implementation("eager")  # only this implementation multiplies float64
    with torch.no_grad():
        expected = model(input_ids=token_ids(), output_router_logits=True)
        found = scaled(input_ids=token_ids(), output_router_logits=True)
    for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def _methods() -> dict[str, Any]:
    gptq = Gptq(bits=4, group_size=16, overrides={"re:.*mlp.*": {"bits": 8, "group_size": None}})
    sparse = Gptq(bits=3, group_size=16, symmetric=False, sparsity=0.3)
    awq, header = Awq(group_size=16), _header("llama", "LlamaForCausalLM")
    mixture = _header("qwen2_moe", "Qwen2MoeForCausalLM")
    return {
        "gptq": Quantized(gptq, gptq.scheme),
        "gptq asymmetric, sparse": Quantized(sparse, sparse.scheme),
        "awq": ActivationAware(awq, awq.scheme, header),
        "smoothquant": RoundedInputs(SmoothQuant(), header),
        "smoothquant, static, gptq": RoundedInputs(
            SmoothQuant(activations="tensor", weights="gptq", alpha=0.5), header
        ),
        "gptq on experts": Quantized(gptq, gptq.scheme),
        "sparsegpt on experts": Sparse(SparseGpt()),
        "awq on experts": ActivationAware(awq, awq.scheme, mixture),
        "smoothquant on experts": RoundedInputs(SmoothQuant(activations="tensor"), mixture),
        "fp8, static": RoundedInputs(Fp8(activations="static"), header),
        "sparsegpt": Sparse(SparseGpt(pattern="2:4")),
        "wanda": WeightAndActivation(Wanda(sparsity=0.5)),
    }


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("name", _methods())
@pytest.mark.slow
def test_an_attempt_killed_after_a_block_is_finished_byte_by_byte_as_if_nothing_happened(name: str, tmp_path: Path):
    source = tmp_path / "source"
    save_model("Qwen2MoeForCausalLM" if "experts" in name else "LlamaForCausalLM", source)

    def press(out: Path, work: Path, **extra: Any) -> Any:
        context = context_of(source, work, "auto", **extra)
        return press_blocks(
            source, out, _methods()[name], {"input_ids": token_ids()}, context, chosen=linears_of(source), recipe=name
        )

    whole = press(tmp_path / "a" / "out", tmp_path / "work-a")

    def kill(_path: str, step: int) -> None:
        if step == 2:
            raise _KilledError

    with pytest.raises(_KilledError):
        press(tmp_path / "b" / "out", tmp_path / "work-b", checkpoint=kill)
    shutil.rmtree(tmp_path / "b" / "out" / "model-00004-of-00004.safetensors", ignore_errors=True)
    written: list[int] = []
    resumed = press(tmp_path / "b" / "out", tmp_path / "work-b", checkpoint=lambda _path, step: written.append(step))
    assert min(written) > 2
    assert resumed == whole
    names = sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b" / "out").iterdir())
    for file in names:
        assert (tmp_path / "a" / "out" / file).read_bytes() == (tmp_path / "b" / "out" / file).read_bytes(), file


class _RunsOut(_Looks):
    """A method that runs out of memory once, in the second block. It keeps weak references to its statistics."""

    def __init__(self, by_group: bool) -> None:
        super().__init__(by_group)
        self.ran_out = False
        self.watched: list[weakref.ref[Power]] = []
        self.left: list[int] = []  #: how many of the failed run's statistics were alive at each `watch` of the next run

    def watch(self, columns: int, device: torch.device) -> Power:
        if self.ran_out:
            self.left.append(sum(reference() is not None for reference in self.watched))
        statistic = super().watch(columns, device)
        if not self.ran_out:
            self.watched.append(weakref.ref(statistic))
        return statistic

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        if not self.ran_out and any(".1." in name for group in inputs for name in group.names):
            self.ran_out = True
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        settled = super().settle(block, inputs, device)
        self.seen = {}
        return settled


@pytest.mark.parametrize("by_group", [False, True])
def test_a_run_that_was_out_of_memory_is_gone_before_the_next_begins(by_group: bool, tmp_path: Path):
    save_model("LlamaForCausalLM", tmp_path / "source")
    method, living = _RunsOut(by_group), []

    def progress(_fraction: float, message: str) -> None:
        if "once more" in message:
            living.extend(get_object for get_object in gc.get_objects() if type(get_object) is ForwardPass)

    context = context_of(tmp_path, tmp_path / "work", progress=progress)
    chosen = linears_of(tmp_path / "source")
    samples = {"input_ids": token_ids()}
    press_blocks(tmp_path / "source", tmp_path / "out", method, samples, context, chosen=chosen, recipe="looks")
    assert method.ran_out
    assert not living
    assert method.left[0] == 0
