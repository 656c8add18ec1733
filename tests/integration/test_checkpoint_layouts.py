"""Every pass on checkpoints of every kind of layout: the result is complete, loads in transformers, and is the same for all layouts."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe

_TRAIN = {"steps": 2, "batch": 4, "length": 16, "validation": 0.0}
PASSES: dict[str, dict[str, Any]] = {
    "weight-only": {"group_size": 16},
    "magnitude": {"sparsity": 0.3},
    "channels": {"multiple": 8},
    "heads": {"share": 0.5},
    "layers": {"count": 1},
    "experts": {"share": 0.5},
    "gptq": {"group_size": 16},
    "awq": {"group_size": 16},
    "rotate": {},
    "learned-rounding": {"group_size": 16, "steps": 10, "batch": 2},
    "smoothquant": {},
    "fp8": {"activations": "static"},
    "kv-cache": {},
    "sparsegpt": {"pattern": "2:4"},
    "wanda": {"pattern": "2:4"},
    "distill": {"student": {"layers": [0, 2]}, "train": _TRAIN},
    "recover": {"train": _TRAIN},
    "early-exit": {"exits": [1]},
    "generation-cache": {"mode": "dynamic"},
    "vocabulary": {"data": "letters"},
    "qat": {"bits": 8, "group_size": 16, "train": _TRAIN},
}
_OF_MIXTURES = {"experts"}
_OF_CODES = {"recover-scales"}  #: tests/integration/test_recover_scales.py
_OF_EMBEDDERS = {"static-embeddings", "truncate-embeddings"}  #: tests/integration/test_static_embeddings.py
_OF_LLAMA_CPP = {"k-quants"}  #: tests/integration/test_k_quants.py
_BY_TIMES = {"shape-to-speed"}  #: tests/integration/test_shape_to_speed.py
_STORES_CODES = {"weight-only", "gptq", "awq", "learned-rounding", "smoothquant", "fp8", "kv-cache", "qat"}
#: from `_unread_tensors`, and the scales that `kv-cache` writes for vLLM
_UNKNOWN_TO_TRANSFORMERS = ("inv_freq", "k_scale", "v_scale")
_EXTRA = {
    "README.md": "---\nlicense: mit\n---\nA model.\n",
    "LICENSE": "MIT License\n",
    "chat_template.jinja": "{{ messages[0].content }}",
    "special_tokens_map.json": '{"unk_token": "[UNK]"}',
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
}

Tensors = dict[str, Tensor]
#: file name → its tensors
Files = dict[str, Tensors]


def _one_file(tensors: Tensors) -> Files:
    return {"model.safetensors": tensors}


def _one_shard(tensors: Tensors) -> Files:
    return {"model-00001-of-00001.safetensors": tensors}


def _shard_a_block(tensors: Tensors) -> Files:
    files: Files = {}
    for name, tensor in tensors.items():
        block = next((part for part in name.split(".") if part.isdigit()), "rest")
        files.setdefault(f"model-{block}.safetensors", {})[name] = tensor
    return files


def _split_blocks(tensors: Tensors) -> Files:
    files: Files = {}
    for at, name in enumerate(sorted(tensors)):
        files.setdefault(f"model-0000{at % 3 + 1}-of-00003.safetensors", {})[name] = tensors[name]
    return files


def _unread_tensors(tensors: Tensors) -> Files:
    """Adds tensors that no module of the model reads, in a block and outside. Older versions of transformers stored such buffers."""
    unread = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "model.rotary_emb.inv_freq": torch.arange(4.0),
    }
    return _split_blocks({**tensors, **unread})


LAYOUTS: dict[str, Callable[[Tensors], Files]] = {
    "one shard and an index": _one_shard,
    "a shard a block": _shard_a_block,
    "shards that split blocks": _split_blocks,
    "tensors that nobody reads": _unread_tensors,
    "one file and an index": _one_file,
}
#: Layouts that another one nearly is: they are tried with one pass of each way to read a model.
_CLOSE_TO_OTHERS = {"one shard and an index", "shards that split blocks"}
_OF_EACH_WAY = {"weight-only", "gptq", "channels", "distill"}

_SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPE))
    return _write(model, tmp_path_factory.mktemp("layouts") / "one-file")


@pytest.fixture(scope="module")
def one_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2)
    return _write(transformers.MixtralForCausalLM(config), tmp_path_factory.mktemp("layouts") / "one-mixture")


def _write(model: Any, folder: Path) -> Path:
    """Write a model with random weights, a tokenizer of letters, and files that passes copy."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02 + (parameter.dim() == 1))
    model.save_pretrained(folder)
    letters = {token: at for at, token in enumerate(["[UNK]", "[PAD]", "</s>", *string.ascii_letters])}
    tokenizer = Tokenizer(models.WordLevel(letters, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, text in _EXTRA.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _laid_out(source: Path, layout: str, folder: Path) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = LAYOUTS[layout](tensors)
    for file, held in files.items():
        save_file(held, folder / file, {"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _run(name: str, source: Path, work: Path) -> Path:
    header = inspect_model(FolderFiles(source))
    raw = {
        "name": "r",
        "passes": [{"pass": name, **PASSES[name]}],
        "exports": ["compressed-tensors" if name in _STORES_CODES else "safetensors"],
    }
    options = parse_recipe(raw).passes[0]
    (work / "work").mkdir(parents=True)
    letters = work / "letters.jsonl"
    letters.write_text(json.dumps({"text": string.ascii_letters}))
    context = PassContext(
        header=header,
        work_dir=work / "work",
        calibration=Calibration(samples=4, length=16),
        data_files={"letters": letters},
    )
    MODEL_PASSES[name](source, work / "out", options, context)
    return work / "out"


def _tensors(folder: Path) -> Tensors:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


def _answers(model: Any) -> Tensor:
    ids = torch.randint(3, 55, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


_EXPECTED: dict[str, tuple[Tensors, Tensor]] = {}


def _expected(name: str, one_file: Path, work: Path) -> tuple[Tensors, Tensor]:
    """The tensors and outputs that the pass gives for the model in one file."""
    if name not in _EXPECTED:
        out = _run(name, one_file, work / "one-file")
        _EXPECTED[name] = _tensors(out), _answers(_load(out)[0])
    return _EXPECTED[name]


def test_every_pass_is_walked():
    own = _OF_EMBEDDERS | _OF_CODES | _OF_LLAMA_CPP | _BY_TIMES
    assert set(PASSES) == set(MODEL_PASSES) - own


# torch warns that it will remove a dtype that transformers uses for the scales.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in PASSES for layout in LAYOUTS if name in _OF_EACH_WAY or layout not in _CLOSE_TO_OTHERS],
)
@pytest.mark.slow
def test_a_pass_leaves_the_same_whole_checkpoint_of_every_layout(
    name: str, layout: str, one_file: Path, one_mixture: Path, tmp_path: Path
):
    brought = one_mixture if name in _OF_MIXTURES else one_file
    source = _laid_out(brought, layout, tmp_path / "source")
    out = _run(name, source, tmp_path)
    if name not in _STORES_CODES:
        inspect_model(FolderFiles(out))  # as the next pass reads it
    model, info = _load(out)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert {
        unexpected_key
        for unexpected_key in info["unexpected_keys"]
        if not unexpected_key.endswith(_UNKNOWN_TO_TRANSFORMERS)
    } == set()
    tensors, answers = _expected(name, brought, tmp_path)
    found = _tensors(out)
    assert {item for item in found if not item.endswith("inv_freq")} == set(tensors)
    assert all(torch.equal(found[tensor], tensors[tensor]) for tensor in tensors), (
        "the layout changed what was computed"
    )
    assert torch.equal(_answers(model), answers)
    for extra in (*_EXTRA, *(() if name == "vocabulary" else ("tokenizer.json",))):
        assert (out / extra).read_bytes() == (source / extra).read_bytes()
