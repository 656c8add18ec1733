"""The blocks executor on small models of every family: the inputs that it observes, its output, and resuming after a kill."""

import gc
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.calibration import model_inputs
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs, press_blocks
from nightpress.core.compress.executors.blocks.forward import ForwardPass
from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.model.families import FOLDS
from nightpress.core.compress.passes.activations import RoundedInputs
from nightpress.core.compress.passes.calibrated import ActivationAware, Quantized, Sparse, WeightAndActivation
from nightpress.core.compress.passes.folding import Folding
from nightpress.core.compress.solvers.wanda import Power
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.linears import is_linear_weight
from nightpress.core.recipes.passes import Awq, Fp8, Gptq, SmoothQuant, SparseGpt, Wanda

_SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "vocab_size": 97,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**_GROUPED, **_IDS},
    "MistralForCausalLM": {**_GROUPED, **_IDS, "sliding_window": 8},
    "Qwen2ForCausalLM": {**_GROUPED, **_IDS, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "Qwen3ForCausalLM": {**_GROUPED, **_IDS, "head_dim": 8},
    "GemmaForCausalLM": {**_GROUPED, **_IDS, "head_dim": 8},
    "Gemma2ForCausalLM": {**_GROUPED, **_IDS, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "PhiForCausalLM": {**_GROUPED, **_IDS},
    "Phi3ForCausalLM": {**_GROUPED, **_IDS},
    "GPTNeoXForCausalLM": {**_SMALL, **_IDS},
    "OPTForCausalLM": {**_SMALL, **_IDS, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "GPT2LMHeadModel": {**_IDS, "n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 97, "n_positions": 64},
    "Gemma3ForCausalLM": {**_GROUPED, **_IDS, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "FalconForCausalLM": {**_SMALL, **_IDS},
    "Starcoder2ForCausalLM": {**_GROUPED, **_IDS},
    "GPTBigCodeForCausalLM": {**_IDS, "n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 97, "n_positions": 64},
    "MixtralForCausalLM": {**_GROUPED, **_IDS, "num_local_experts": 4},
    "Qwen2MoeForCausalLM": {
        **_GROUPED,
        **_IDS,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "OlmoeForCausalLM": {**_GROUPED, **_IDS, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5},
    "Qwen3MoeForCausalLM": {
        **_GROUPED,
        **_IDS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 8,
    },
    "T5ForConditionalGeneration": {
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 3,
        "d_ff": 64,
        "vocab_size": 97,
        "decoder_start_token_id": 0,
    },
    "ViTForImageClassification": {
        **{key: value for key, value in _SMALL.items() if key != "vocab_size"},
        "image_size": 32,
        "patch_size": 8,
    },
    "AlbertForMaskedLM": {**_SMALL, "embedding_size": 16},
    "BertForMaskedLM": _SMALL,
    "RobertaForSequenceClassification": {**_SMALL, "max_position_embeddings": 66},
    "DistilBertForMaskedLM": {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 64, "vocab_size": 97},
    "MPNetForMaskedLM": {**_SMALL, "max_position_embeddings": 66},
    "ElectraForMaskedLM": {**_SMALL, "embedding_size": 16},
    "ModernBertForMaskedLM": {**_SMALL, **_IDS, "cls_token_id": 3, "sep_token_id": 4, "local_attention": 8},
    "DebertaV2ForMaskedLM": {
        **_SMALL,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
    },
}


def _save(class_name: str, folder: Path) -> Any:
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**FAMILIES[class_name])).eval()
    for parameter in model.parameters():  # random norms and biases: the initial ones and zeros would hide errors
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def _ids(samples: int = 5, length: int = 24) -> Tensor:
    return torch.randint(5, 97, (samples, length), generator=torch.Generator().manual_seed(1))


def _samples(family: str, ids: Tensor) -> dict[str, Tensor]:
    """The inputs of the family's models."""
    if family.startswith("ViT"):
        return {"pixel_values": torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    header = ModelHeader(model_type="x", architecture=family, config={}, tensors=(), has_tokenizer=False)
    return model_inputs(ids, header)


def _context(source: Path, work: Path, dtype: Literal["auto", "float32"] = "float32", **extra: Any) -> PassContext:
    """A context. By default it computes in float32, so that results can be compared with the whole model in float32."""
    header = ModelHeader(model_type="x", architecture="x", config={}, tensors=(), has_tokenizer=False)
    if (source / "tokenizer.json").exists():
        header = inspect_model(FolderFiles(source))
    return PassContext(header=header, work_dir=work, calibration=Calibration(dtype=dtype), **extra)


def _linears(source: Path) -> frozenset[str]:
    infos = [tensor.info for shard in read_shards(source) for tensor in shard.tensors]
    return frozenset(info.name for info in infos if is_linear_weight(info, Wanda().ignore))


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
    model = _save(family, tmp_path / "source")
    looks, samples = _Looks(by_group=in_turn), _samples(family, _ids())
    chosen = _linears(tmp_path / "source")
    pressed = press_blocks(
        tmp_path / "source",
        tmp_path / "out",
        looks,
        samples,
        _context(tmp_path, tmp_path / "work"),
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
    _save(family, tmp_path / "source")
    seen = {}
    for dtype in ("auto", "float32"):
        looks, context = _Looks(by_group=True), _context(tmp_path, tmp_path / "work", dtype)
        chosen, samples = _linears(tmp_path / "source"), _samples(family, _ids())
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


@pytest.mark.parametrize("model_type", sorted(Awq.model_types))
def test_awq_leaves_the_function_as_it_is_but_for_rounding(model_type: str, tmp_path: Path):
    """With 8 bits and groups of 16 the rounding error is small. A larger difference would mean that a factor was applied wrongly."""
    family = next(
        name
        for name in FAMILIES
        if name.lower().removesuffix("forcausallm") == model_type.removesuffix("_text").replace("_", "")
    )
    model = _save(family, tmp_path / "source")
    source, out, again = tmp_path / "source", tmp_path / "out", tmp_path / "again"
    options = Awq(bits=8, group_size=16)
    method = ActivationAware(options, options.scheme, _header(model_type, family))
    press_blocks(
        source,
        out,
        method,
        {"input_ids": _ids()},
        _context(source, tmp_path / "work"),
        chosen=_linears(source),
        recipe="awq",
    )
    written = _load(out)
    state = {}
    for name in load_file(source / "model.safetensors"):
        state[name] = written[name] if name in written else method.restore(name, written)
    before = load_file(source / "model.safetensors")
    assert any("norm" in name and not torch.equal(before[name], tensor) for name, tensor in state.items())
    assert set(FOLDS) == Awq.model_types
    again.mkdir()
    shutil.copy(source / "config.json", again)
    save_file(state, again / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        expected = model(input_ids=_ids()).logits
        found = type(model).from_pretrained(again)(input_ids=_ids()).logits
    assert float((found - expected).norm() / expected.norm()) < 0.02


class _Scaled:
    """A method that leaves weights in float, but exchanges random factors between the layers of every fold."""

    by_group = False

    def __init__(self, header: ModelHeader) -> None:
        self._folding = Folding(header)
        self.scaled: set[str] = set()

    def watch(self, columns: int, device: torch.device) -> Power:
        return Power(columns, device)

    def settle(self, block: LiveBlock, inputs: Sequence[Inputs], device: torch.device) -> dict[str, FinalTensor]:
        seen = {name: group for group in inputs for name in group.names}
        floats = {name: block[name].to(device).float() for name in seen}
        for place in self._folding.places(block, seen):
            columns = block[place.targets[0]].shape[1]
            factors = torch.rand(columns, generator=torch.Generator().manual_seed(columns)) * 8 + 0.125
            if place.kind == "values":
                heads, width = place.share
                grouped = factors.view(heads, -1, width)
                factors = grouped[:, :1].expand_as(grouped).reshape(-1)
            place.apply(factors, block, floats)
            self.scaled |= {*place.targets, *place.routers}
        return {
            name: FinalTensor(weight=weight, tensors={name: weight}, effect=None) for name, weight in floats.items()
        }

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


@pytest.mark.parametrize("family", [name for name in FAMILIES if "Moe" in name or "moe" in name or "Mixtral" in name])
def test_a_mixture_whose_layers_exchanged_factors_answers_as_before(family: str, tmp_path: Path):
    """Nothing is rounded, so the router chooses the same experts, and each expert gives the same outputs."""
    model = _save(family, tmp_path / "source")
    source, out = tmp_path / "source", tmp_path / "out"
    method = _Scaled(_header(model.config.model_type, family))
    samples, context = {"input_ids": _ids()}, _context(source, tmp_path / "work")
    press_blocks(source, out, method, samples, context, chosen=_linears(source), recipe="scaled")
    kept = {name for name in method.scaled if "experts" in name or name.endswith("gate.weight")}
    experts = {name for name in _load(source) if "experts" in name or name.endswith("gate.weight")}
    assert kept == experts  # all experts, and their routers
    shutil.copy(source / "config.json", out)
    scaled = type(model).from_pretrained(out)
    for which in (model, scaled):
        which.double().set_experts_implementation("eager")  # only this implementation multiplies float64
    with torch.no_grad():
        expected = model(input_ids=_ids(), output_router_logits=True)
        found = scaled(input_ids=_ids(), output_router_logits=True)
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
        "awq on experts": ActivationAware(awq, awq.scheme, mixture),
        "smoothquant on experts": RoundedInputs(SmoothQuant(activations="tensor"), mixture),
        "fp8, static": RoundedInputs(Fp8(activations="static"), header),
        "sparsegpt": Sparse(SparseGpt(pattern="2:4")),
        "wanda": WeightAndActivation(Wanda(sparsity=0.5)),
    }


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("name", _methods())
def test_an_attempt_killed_after_a_block_is_finished_byte_by_byte_as_if_nothing_happened(name: str, tmp_path: Path):
    source = tmp_path / "source"
    _save("Qwen2MoeForCausalLM" if "experts" in name else "LlamaForCausalLM", source)

    def press(out: Path, work: Path, **extra: Any) -> Any:
        context = _context(source, work, "auto", **extra)
        return press_blocks(
            source, out, _methods()[name], {"input_ids": _ids()}, context, chosen=_linears(source), recipe=name
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
    _save("LlamaForCausalLM", tmp_path / "source")
    method, living = _RunsOut(by_group), []

    def progress(_fraction: float, message: str) -> None:
        if "once more" in message:
            living.extend(get_object for get_object in gc.get_objects() if type(get_object) is ForwardPass)

    context = _context(tmp_path, tmp_path / "work", progress=progress)
    chosen = _linears(tmp_path / "source")
    samples = {"input_ids": _ids()}
    press_blocks(tmp_path / "source", tmp_path / "out", method, samples, context, chosen=chosen, recipe="looks")
    assert method.ran_out
    assert not living
    assert method.left[0] == 0
