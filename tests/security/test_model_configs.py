"""S3, S24: configs that lie, that no two readers read alike, or that would have code run or fetched are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.errors import ErrorCode
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.remote_code import code_flaw
from tests.service import MIB
from tests.tiny_model import CONFIG, refused


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_experts_per_tok", "²"), ("dim", -1), ("word_embed_proj_dim", "x"), ("hidden_dim", 2**40), ("dim", True)],
)
def test_sizes_that_plans_reckon_with_are_numbers(folder: Path, key: str, value: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    assert key in refused(folder, ErrorCode.MALFORMED_MODEL).message


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_scaling", 3), ("rope_parameters", {"rope_type": []}), ("sliding_window", "4096"), ("layer_types", 1), ("id2label", ["a"])],
)  # fmt: skip
def test_what_plans_read_has_the_kind_that_transformers_writes(folder: Path, key: str, value: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    assert "not a" in refused(folder, ErrorCode.MALFORMED_MODEL).message


_KERNELS = (
    "acme/flash",
    "acme/flash@main:attention",
    "paged|acme/flash",
    "paged|eager",
    "flash_attention_2",
    "flash_attention_3",
    "msa_attention",
    "",
    7,
    ["acme/flash"],
    {"": "eager", "text_config": "acme/flash"},
    {"text_config": {"": "acme/flash"}},
)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}},
        {"hidden_size": 10**9},
        {"hidden_size": 10**400},
        {"hidden_size": "4"},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"text_config": {"num_hidden_layers": 10**7}},
        {"vocab_size": True},
        {"intermediate_size": [4, 10**12]},
        {"_name_or_path": "../../etc"},
        {"_name_or_path": "..\\..\\etc"},
        {"model_type": "../../bert"},
        {"architectures": ["__import__('os')"]},
        {"architectures": [["BertModel"]]},
        {"note": "a\0b"},
        {"note\0": 1},
        {"note": float("inf")},
    ],
)
def test_a_hostile_config_is_refused(folder: Path, change: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    refused(folder, ErrorCode.MALFORMED_MODEL, ErrorCode.UNSUPPORTED_FORMAT, ErrorCode.UNSUPPORTED_ARCHITECTURE)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model_type": "bert", "model_type": "llama"}',
        b'{"model_type": "bert", "x": ' + b"[" * 200_000,
        b'{"model_type": "bert", "x": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"model_type": "bert", "x": 1e999}',
        b'{"model_type": "bert", "x": "\\ud800"}',
        b'{"model_type": "bert", "x": ' + b"9" * 100_000 + b"}",
        b'{"model_type": "bert", "x": "' + b"y" * 2 * MIB + b'"}',
        b'\xff\xfe{"model_type": "bert"}',
    ],
)
def test_a_config_that_no_reader_agrees_on_is_refused(folder: Path, raw: bytes) -> None:
    (folder / "config.json").write_bytes(raw)
    refused(folder, ErrorCode.MALFORMED_MODEL)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json", "1_Pooling/config.json"])
def test_code_named_beside_the_config_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    assert refused(folder, ErrorCode.UNSUPPORTED_FORMAT).details["file"] == name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal") for value in _KERNELS),
        *((key, value) for key in ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")
          for value in ("acme/experts", "sonicmoe", "deepgemm", {"": "eager", "text_config": "deepgemm"})),
        ("custom_pipelines", {"evil": {"impl": "evil.Pipeline", "pt": ["AutoModel"]}}),
        ("custom_generate", "acme/evil"),
        ("kernel_config", {"kernel_mapping": {"RMSNorm": "acme/norm:RMSNorm"}}),
        ("use_kernels", True),
        ("allow_all_kernels", True),
        ("trust_remote_code", True),
        ("_custom_object_save", "evil.py"),
        ("transformers_weights", "../other/model.safetensors"),
        ("transformers_weights", "adapter_model.safetensors"),
        ("auto_map", {"AutoModel": "evil.Model"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "1_Pooling/config.json"]
)
def test_no_field_has_code_fetched(folder: Path, name: str, key: str, value: object) -> None:
    """The field is tried at the top of a file and in the config of a part of the model."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    whole = json.loads(path.read_text()) if path.exists() else {}
    for change in ({key: value}, {"text_config": {key: value}}, {"parts": [{"config": {key: value}}]}):
        path.write_text(json.dumps({**whole, **change}))
        error = refused(folder, ErrorCode.UNSUPPORTED_FORMAT)
        assert error.details["file"] == name
        assert key in error.message
        assert key in error.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "eager", "attn_implementation": None, "_attn_implementation_internal": "sdpa"},
        {"attn_implementation": {"": "sdpa", "text_config": "flex_attention", "vision_config": None}},
        {"_experts_implementation": "grouped_mm", "experts_implementation": {"": "batched_mm", "text_config": "eager"}},
        {"trust_remote_code": False, "use_kernels": False, "custom_pipelines": {}, "kernel_config": None},
        {"_attn_implementation_autoset": True, "transformers_weights": "model.safetensors"},
    ],
)
def test_fields_that_name_what_is_built_in_are_taken(folder: Path, fields: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields, "text_config": fields}))
    inspect_model(FolderFiles(folder))


def test_transformers_own_implementations_are_those_that_are_taken() -> None:
    """If transformers adds an implementation that fetches nothing, it may be added to our list. If it removes one, so must our list."""
    from transformers.integrations.hub_kernels import is_kernel
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = {
        name for name in ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()] if not code_flaw("attn_implementation", name)
    }
    experts = {
        name for name in ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()] if not code_flaw("experts_implementation", name)
    }
    assert attention == {"eager", "sdpa", "flex_attention"}
    assert experts == {"eager", "batched_mm", "grouped_mm"}
    assert not any(is_kernel(name) for name in attention | experts)


def test_all_fields_that_name_code_are_told_at_once(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {}, "custom_pipelines": {"evil": {}}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    error = refused(folder, ErrorCode.UNSUPPORTED_FORMAT)
    assert [fault["at"] for fault in error.details["faults"]] == ["config.json", "config.json", "tokenizer_config.json"]
    assert "auto_map" in error.hint
    assert "custom_pipelines" in error.hint


def test_a_chat_template_that_reaches_for_python_is_refused(folder: Path) -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    for name, raw in (
        ("chat_template.jinja", attack),
        ("tokenizer_config.json", json.dumps({"chat_template": attack})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "tool", "template": attack}]})),
        ("chat_template.json", json.dumps({"chat_template": attack})),
    ):
        (folder / name).write_text(raw)
        refused(folder, ErrorCode.MALFORMED_MODEL)
        (folder / name).unlink()
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m.content }}\n{% endfor %}")
    inspect_model(FolderFiles(folder))
