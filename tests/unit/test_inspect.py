"""Which models are accepted, and how they are described. Hostile files: tests/security/test_model_files.py and test_model_configs.py."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.filenames import is_model_file
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.selection import select_files

CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 4}


class MemoryFiles:
    """A model's folder held in memory."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)

    def names(self) -> Mapping[str, int]:
        return {path: len(data) for path, data in self.files.items()}

    def read(self, path: str, offset: int, size: int) -> bytes:
        return self.files[path][offset : offset + size]


def safetensors(
    tensors: Mapping[str, tuple[str, list[int]]], widths: Mapping[str, int] = {"F32": 4, "BF16": 2}
) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = widths[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + bytes(at)


def model(**changes: bytes | None) -> MemoryFiles:
    files: dict[str, bytes | None] = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": safetensors({"a.weight": ("F32", [2, 3]), "b.weight": ("BF16", [5])}),
        "tokenizer.json": b"{}",
        **{name.replace("__", "."): data for name, data in changes.items()},
    }
    return MemoryFiles({path: data for path, data in files.items() if data is not None})


def refused(files: MemoryFiles) -> NightpressError:
    with pytest.raises(NightpressError) as error:
        inspect_model(files)
    assert error.value.hint
    return error.value


def test_a_model_is_described_from_its_headers() -> None:
    header = inspect_model(model())
    assert (header.model_type, header.architecture, header.task) == ("bert", "BertModel", "embedding")
    assert [(tensor.name, tensor.dtype, tensor.shape, tensor.size) for tensor in header.tensors] == [
        ("a.weight", "F32", (2, 3), 24),
        ("b.weight", "BF16", (5,), 10),
    ]
    assert (header.parameters, header.size, header.has_tokenizer) == (11, 34, True)


@pytest.mark.parametrize(
    ("tensors", "architecture", "task"),
    [
        (("embeddings.word.weight", "encoder.layer.0.q.weight", "pooler.dense.weight"), "MPNetModel", "embedding"),
        (("mpnet.embeddings.word.weight", "lm_head.dense.weight"), "MPNetForMaskedLM", "masked-lm"),
        (("embeddings.word.weight", "lm_head.dense.weight"), "MPNetForMaskedLM", "masked-lm"),
    ],
)
def test_an_encoder_without_its_head_is_an_embedder_whatever_its_config_says(
    tensors: tuple[str, ...], architecture: str, task: str
) -> None:
    """all-mpnet-base-v2 names a masked language model but has no head: a loader would give it a head with random weights."""
    config = CONFIG | {"model_type": "mpnet", "architectures": ["MPNetForMaskedLM"]}
    weights = safetensors({name: ("F32", [2, 3]) for name in tensors})
    header = inspect_model(model(config__json=json.dumps(config).encode(), model__safetensors=weights))
    assert (header.architecture, header.task) == (architecture, task)


def test_a_missing_tokenizer_is_noted_not_refused() -> None:
    assert not inspect_model(model(tokenizer__json=None)).has_tokenizer


def test_real_models_pass(bert_tiny: Path, minilm: Path) -> None:
    tiny, embedder = inspect_model(FolderFiles(bert_tiny)), inspect_model(FolderFiles(minilm))
    assert (tiny.task, embedder.task) == ("masked-lm", "embedding")
    assert embedder.parameters == 22_713_728
    assert tiny.has_tokenizer
    assert embedder.has_tokenizer


def test_the_reader_agrees_with_the_library_that_wrote_the_file(minilm: Path) -> None:
    from safetensors import safe_open

    with safe_open(minilm / "model.safetensors", framework="numpy") as reference:
        expected = {name: tuple(reference.get_slice(name).get_shape()) for name in reference.keys()}  # noqa: SIM118
    assert {tensor.name: tensor.shape for tensor in inspect_model(FolderFiles(minilm)).tensors} == expected


def sharded(index: object, **shards: bytes) -> MemoryFiles:
    files = model(model__safetensors=None).files
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files |= {f"{name}.safetensors": data for name, data in shards.items()}
    return MemoryFiles(files)


def test_shards_and_their_index_agree() -> None:
    first, second = safetensors({"a": ("F32", [2])}), safetensors({"b": ("F32", [3]), "c": ("F32", [])})
    index = {"weight_map": {"a": "m1.safetensors", "b": "m2.safetensors", "c": "m2.safetensors"}}
    assert {tensor.name for tensor in inspect_model(sharded(index, m1=first, m2=second)).tensors} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("weight_map", "why"),
    [
        ({"a": "m1.safetensors", "b": "m2.safetensors"}, "does not place the tensor c"),
        ({"a": "m1.safetensors", "b": "m2.safetensors", "c": "m1.safetensors"}, "does not place the tensor c"),
        ({"a": "m1.safetensors", "b": "m2.safetensors", "c": "m2.safetensors", "d": "m2.safetensors"}, "tensor d"),
        ({"a": "m1.safetensors", "b": "m3.safetensors"}, "m3.safetensors, which is not there"),
        ({"a": "m1.safetensors", "b": "weights.bin"}, "weights.bin, which is no safetensors file"),
        ({"a": 1}, "no `weight_map`"),
        ({}, "no `weight_map`"),
        ([], "no `weight_map`"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_malformed(weight_map: object, why: str) -> None:
    first, second = safetensors({"a": ("F32", [2])}), safetensors({"b": ("F32", [3]), "c": ("F32", [])})
    error = refused(sharded({"weight_map": weight_map}, m1=first, m2=second))
    assert error.code is ErrorCode.MALFORMED_MODEL
    assert pytest.raises(NightpressError, match=why)
    with pytest.raises(NightpressError, match=why):
        inspect_model(sharded({"weight_map": weight_map}, m1=first, m2=second))


@pytest.mark.parametrize(
    ("changes", "code", "file"),
    [
        ({"config__json": None}, ErrorCode.MALFORMED_MODEL, "config.json"),
        ({"config__json": b"[]"}, ErrorCode.MALFORMED_MODEL, "config.json"),
        ({"config__json": b"{"}, ErrorCode.MALFORMED_MODEL, "config.json"),
        ({"config__json": b"{}"}, ErrorCode.UNSUPPORTED_ARCHITECTURE, "config.json"),
        ({"config__json": b'{"model_type": 7}'}, ErrorCode.UNSUPPORTED_ARCHITECTURE, "config.json"),
        (
            {"config__json": b'{"model_type": "bert", "architectures": "BertModel"}'},
            ErrorCode.MALFORMED_MODEL,
            "config.json",
        ),
        (
            {"config__json": b'{"model_type": "bert", "quantization_config": [4]}'},
            ErrorCode.MALFORMED_MODEL,
            "config.json",
        ),
        ({"model__safetensors": None}, ErrorCode.UNSUPPORTED_FORMAT, None),
        (
            {"model__safetensors": None, "other__safetensors": safetensors({})},
            ErrorCode.MALFORMED_MODEL,
            "other.safetensors",
        ),
        ({"generation_config__json": b"{"}, ErrorCode.MALFORMED_MODEL, "generation_config.json"),
    ],
)
def test_a_flaw_is_told_with_its_file(changes: dict[str, bytes | None], code: ErrorCode, file: str | None) -> None:
    error = refused(model(**changes))
    assert error.code is code
    assert error.details.get("file") == file


def test_a_truncated_file_is_told_as_such() -> None:
    whole = model().files["model.safetensors"]
    for cut in (whole[:-1], whole[:100], whole[:8], whole[:3], b""):
        error = refused(model(model__safetensors=cut))
        assert error.code is ErrorCode.MALFORMED_MODEL
        assert error.details["file"] == "model.safetensors"
        assert "truncated" in error.message or "too short" in error.message


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "merges.txt", "chat_template.jinja", "1_Pooling/config.json"])
def test_what_comes_beside_the_weights_is_taken(name: str) -> None:
    files = model().files
    files[name] = b"{}"
    assert is_model_file(name)
    assert inspect_model(MemoryFiles(files)).parameters == 11


def test_hidden_files_of_a_folder_are_passed_over(bert_tiny: Path, tmp_path: Path) -> None:
    for path in bert_tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / ".gitattributes").write_text("*.bin filter=lfs")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.lock").touch()
    assert set(FolderFiles(tmp_path).names()) == {path.name for path in bert_tiny.iterdir()}


# Folders that are no model, and models with other files beside them ----------------------------------------------------

WEIGHTS = safetensors({"a": ("F32", [2])})
CONFIG_BYTES = json.dumps(CONFIG).encode()
INDEX = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    ("files", "said", "to_do"),
    [
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS, "training_args.bin": b""},
            "an adapter (LoRA) without the model",
            "--base MODEL_FOLDER",
        ),
        (
            {"adapter_config.json": b"{}", "adapter_model.bin": b"", "README.md": b""},
            "an adapter (LoRA) without the model",
            "--base MODEL_FOLDER",
        ),
        (
            {"config.json": CONFIG_BYTES, "model.safetensors": WEIGHTS, "adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS},
            "adapter_config.json and adapter_model.safetensors belong to an adapter",
            "Take adapter_config.json and adapter_model.safetensors out",
        ),
        (
            {"config.json": CONFIG_BYTES, "model.safetensors": WEIGHTS, "model.safetensors.index.json": INDEX},
            "model.safetensors.index.json is stale",
            "delete model.safetensors.index.json",
        ),
        (
            {"config.json": CONFIG_BYTES, "model-00001-of-00002.safetensors": WEIGHTS, "model.safetensors.index.json": INDEX},
            "it names model-00002-of-00002.safetensors, which is not there",
            "Fetch the missing shards",
        ),
        (
            {"params.json": b"{}", "consolidated.safetensors": WEIGHTS, "tokenizer.model": b""},
            "which transformers doesn't read",
            "as transformers saves it",
        ),
        (
            {
                "config.json": CONFIG_BYTES,
                "model.safetensors": WEIGHTS,
                "modules.json": b'[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]',
                "2_Dense/config.json": b"{}",
                "2_Dense/model.safetensors": WEIGHTS,
            },
            "a module of sentence-transformers",
            "leave 2_Dense out, take its entry out of modules.json",
        ),
        (
            {
                "config.json": CONFIG_BYTES,
                "model.safetensors.index.json": b'{"weight_map": {"a": "shards/m.safetensors"}}',
                "shards/m.safetensors": WEIGHTS,
            },
            "shards/m.safetensors holds weights in a sub-folder",
            "Weights lie at the top",
        ),
        ({"0_Transformer/config.json": CONFIG_BYTES, "0_Transformer/model.safetensors": WEIGHTS}, "lies in a sub-folder", "Bring 0_Transformer"),
        ({"model-Q4_K_M.gguf": b"GGUF", "README.md": b""}, "holds GGUF weights", "nightpress convert FILE.gguf"),
        ({"config.json": CONFIG_BYTES, "weights.tar.gz": b""}, "holds an archive", "Unpack it"),
        ({"config.json": CONFIG_BYTES, "onnx/model.onnx": b""}, "holds ONNX weights", "the model that it was exported from"),
        (
            {"config.json": CONFIG_BYTES, "openvino_model.xml": b"", "openvino_model.bin": b""},
            "holds OpenVINO weights",
            "`openvino` in a recipe's `exports`",
        ),
        ({"config.json": CONFIG_BYTES, "tf_model.h5": b""}, "holds TensorFlow weights", "transformers 4"),
        (
            {"model_index.json": b"{}", "unet/config.json": b"{}", "unet/diffusion_pytorch_model.safetensors": b"", "vae/x.bin": b""},
            "a pipeline of diffusers",
            "text_encoder",
        ),
        (
            {"config.json": CONFIG_BYTES, "pytorch_model-00001-of-00002.bin": b"", "pytorch_model-00002-of-00002.bin": b""},
            "pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin",
            "nightpress convert FOLDER",
        ),
        (
            {"config.json": CONFIG_BYTES, "pytorch_model.bin": b"", "onnx/model.onnx": b"", "tf_model.h5": b""},
            "as pickles",
            "nightpress convert FOLDER",
        ),
        ({"model.pt": b""}, "holds weights as pickles", "nightpress convert FOLDER"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_told_what_it_is_and_what_to_do(
    files: dict[str, bytes], said: str, to_do: str
) -> None:
    error = refused(MemoryFiles(files))
    assert said in error.message
    assert to_do in error.hint
    assert "config.json at the top" not in error.message
    assert error.details["file"] in files


#: A repository of the Hub as it lies, beside the model itself.
CLUTTER = {
    ".DS_Store": b"\0\0\0\1Bud1",
    ".cache/huggingface/x.lock": b"",
    ".gitattributes": b"*.bin filter=lfs",
    "Icon\r": b"",
    "consolidated.safetensors": WEIGHTS,
    "coreml/model.mlpackage/Data/weights": b"",
    "desktop.ini": b"[.ShellClassInfo]",
    "flax_model.msgpack": b"",
    "loss.png": b"\x89PNG",
    "modeling_own.py": b"raise SystemExit",
    "model-00001-of-00009.safetensors": WEIGHTS,
    "onnx/config.json": b"{",
    "onnx/model.onnx": b"",
    "optimizer.pt": b"",
    "original/params.json": b"{}",
    "pytorch_model.bin": b"\x80\x04",
    "tf_model.h5": b"",
    "trainer_state.json": b"{",
    "training_args.bin": b"\x80\x04",
}


class OnlyNeeded(MemoryFiles):
    """Fails if something beside the model is read."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        assert path not in CLUTTER, f"{path} was opened"
        return super().read(path, offset, size)


def test_what_lies_beside_a_model_is_never_opened_and_is_told() -> None:
    wanted = {
        **model().files,
        "additional_chat_templates/tools.jinja": b"{{ messages }}",
        "source.spm": b"",
        "README.md": b"",
    }
    files = OnlyNeeded(wanted | CLUTTER)
    assert inspect_model(files).parameters == 11
    found = select_files(files.names(), lambda path: files.read(path, 0, 1 << 20))
    assert set(found.files) == wanted.keys()
    folders = {name.partition("/")[0] + "/" for name in CLUTTER if "/" in name}
    assert (
        set(found.left_out)
        == {name.replace("\r", "\N{REPLACEMENT CHARACTER}") for name in CLUTTER if "/" not in name} | folders
    )


def test_an_announced_upload_is_cleared_by_names_alone() -> None:
    wanted = {
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "pooling/config.json",
    }
    found = select_files(
        [*wanted, "onnx/model.onnx", "run.py", "original/model.safetensors", "consolidated.00.safetensors"], None
    )
    assert set(found.files) == wanted
    assert found.left_out == ("consolidated.00.safetensors", "onnx/", "original/", "run.py")


def test_of_endless_names_a_hundred_are_told() -> None:
    found = select_files([*model().files, *(f"step-{number}.pt" for number in range(300))], None)
    assert len(found.left_out) == 101
    assert found.left_out[-1] == "… and 200 more"


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "a/../b.json", "a//b.json", "./x.json", "a\\b.json", "a\nb.json"]
)
def test_a_name_that_leads_elsewhere_is_malformed(name: str) -> None:
    error = refused(MemoryFiles(model().files | {name: b"{}"}))
    assert (error.code, error.details["file"]) == (ErrorCode.MALFORMED_MODEL, name)


def test_all_shards_that_are_missing_are_told_at_once() -> None:
    error = refused(sharded({"weight_map": {name: f"{name}.safetensors" for name in "abcd"}}, a=WEIGHTS, z=WEIGHTS))
    assert [fault["at"] for fault in error.details["faults"]] == [f"{name}.safetensors" for name in "bcd"]


def test_shards_that_the_index_does_not_name_are_left_over_from_an_earlier_save() -> None:
    index = {"weight_map": {"w": "a.safetensors"}}
    files = sharded(index, a=safetensors({"w": ("F32", [2])}), b=WEIGHTS)
    assert [tensor.name for tensor in inspect_model(files).tensors] == ["w"]
    assert select_files(files.names(), lambda path: files.files[path]).left_out == ("b.safetensors",)


def test_a_stale_index_is_told_before_anything_is_fetched() -> None:
    with pytest.raises(NightpressError, match="is stale"):
        select_files(["config.json", "model.safetensors", "model.safetensors.index.json"], lambda _: INDEX)
