"""S1–S3: hostile model files are refused quickly and cheaply, and nothing in them runs. S10: what a presigned URL allows."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from nightpress.core.artifacts.open import open_store
from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.remote_code import code_flaw
from nightpress.core.settings import Settings
from tests.patience import slowness
from tests.servers import S3

MIB = 1024**2
CONFIG: dict[str, Any] = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny valid model, which the tests corrupt."""
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(root, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, data=8)
    inspect_model(FolderFiles(root))
    return root


def write_safetensors(root: Path, header: object, *, data: int, length: int | None = None) -> None:
    """Write model.safetensors: a header, then `data` zero bytes as a sparse hole. `length`: the header's length to claim, if wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with (root / "model.safetensors").open("wb") as target:
        target.write(struct.pack("<Q", len(raw) if length is None else length) + raw)
        target.truncate(8 + len(raw) + data)


def refused(root: Path, *codes: ErrorCode) -> NightpressError:
    with pytest.raises(NightpressError) as error:
        inspect_model(FolderFiles(root))
    assert error.value.code in codes, error.value
    assert error.value.kind.status == 422
    assert error.value.hint
    return error.value


# S1 ------------------------------------------------------------------------------------------------------------------


class _Bomb:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def _zipped(payload: bytes) -> bytes:
    """The payload in a zip file like that of torch.save, with the flag bit for encryption: some scanners skip such files."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    raw = bytearray(packed.getvalue())
    raw[6] |= 1
    return bytes(raw)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pkl", "config.p", "model.safetensors", "config.json"]
)
@pytest.mark.parametrize("form", ["protocol 4", "protocol 0", "zip"])
def test_a_pickle_is_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str) -> None:
    sentinel = folder.parent / "ran"
    protocol = 0 if form == "protocol 0" else 4
    payload = pickle.dumps(_Bomb(sentinel), protocol=protocol)
    (folder / name).write_bytes(_zipped(payload) if form == "zip" else payload)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for function in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, function, forbidden)
    error = refused(folder, ErrorCode.UNSUPPORTED_FORMAT, ErrorCode.MALFORMED_MODEL)
    assert error.details["file"] == name
    if name not in {"model.safetensors", "config.json"}:
        assert error.code is ErrorCode.UNSUPPORTED_FORMAT
        assert "save_pretrained" in error.hint
    assert not sentinel.exists()


# S2 ------------------------------------------------------------------------------------------------------------------

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _many(count: int, data: int, *, escaped: bool = False) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        key = r"data_offset\u0073" if escaped else "data_offsets"
        entries = (f'"t{n}":{{"dtype":"U8","shape":[0],"{key}":[0,0]}}' for n in range(count))
        write_safetensors(root, ("{" + ",".join(entries) + "}").encode(), data=data)

    return write


def _header(header: object, *, data: int = 8, length: int | None = None) -> Callable[[Path], None]:
    return lambda root: write_safetensors(root, header, data=data, length=length)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "a header of 2^63 bytes": _header(b"{}", length=2**63),
    "a header of 2^64-1 bytes": _header(b"{}", length=2**64 - 1),
    "a header longer than the file": _header({"a": TENSOR}, length=500_000),
    "a header of 120 MB": _header(b'{"a":' + b" " * 120 * MIB + b"}", data=4 * 1024 * MIB),
    "a header over 1 MB and over 5%": _header(b'{"a":' + b" " * 2 * MIB + b"}", data=10 * MIB),
    "spaces without end": _header(b'{"a":' + b" " * 40 * MIB + b"}", data=1024 * MIB),
    "a key twice": _header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ),
    "a key twice, once escaped": _header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ),
    "a field twice": _header(b'{"a":{"dtype":"F32","dtype":"I8","shape":[2],"data_offsets":[0,8]}}'),
    "offsets that overlap": _header({"a": TENSOR, "b": {**TENSOR, "data_offsets": [4, 12]}}, data=12),
    "the same bytes twice": _header({"a": TENSOR, "b": TENSOR}),
    "a hole between tensors": _header({"a": TENSOR, "b": {**TENSOR, "data_offsets": [16, 24]}}, data=24),
    "a hole at the start": _header({"a": {**TENSOR, "data_offsets": [8, 16]}}, data=16),
    "bytes after the last tensor": _header({"a": TENSOR}, data=100),
    "offsets past the end": _header({"a": {**TENSOR, "data_offsets": [0, 8]}}, data=4),
    "offsets backwards": _header({"a": {**TENSOR, "data_offsets": [8, 0]}}),
    "negative offsets": _header({"a": {**TENSOR, "data_offsets": [-8, 0]}}),
    "a shape that overflows 64 bits": _header({"a": {**TENSOR, "shape": [2**32, 2**32, 2**32]}}),
    "a shape that wraps to the right size": _header({"a": {**TENSOR, "shape": [2**63 + 1, 2]}}),
    "a negative dimension": _header({"a": {**TENSOR, "shape": [-1, -2]}}),
    "a dimension that is true": _header({"a": {**TENSOR, "shape": [True, 2]}}),
    "a dimension that is a float": _header({"a": {**TENSOR, "shape": [2.0]}}),
    "a number of a million digits": _header(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,8]}}'
    ),
    "a thousand dimensions": _header({"a": {**TENSOR, "shape": [1] * 1000 + [2]}}),
    "an unknown dtype": _header({"a": {**TENSOR, "dtype": "PICKLE"}}),
    "a dtype that is a list": _header({"a": {**TENSOR, "dtype": ["F32"]}}),
    "an extra field": _header({"a": {**TENSOR, "loader": "os.system"}}),
    "no offsets": _header({"a": {"dtype": "F32", "shape": [2]}}),
    "NaN": _header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "a million empty tensors": _many(1_000_000, 0),
    "a million empty tensors in a large file": _many(1_000_000, 2048 * MIB),
    "a hundred thousand and one, disguised": _many(100_001, 2048 * MIB, escaped=True),
    "50 MB of metadata": _header({"__metadata__": {"x": "y" * 50 * MIB}, "a": TENSOR}, data=2048 * MIB),
    "50 MB of metadata keys": _header({"__metadata__": {str(n): "" for n in range(3_000_000)}}, data=2048 * MIB),
    "metadata that is no text": _header({"__metadata__": {"x": {"y": 1}}, "a": TENSOR}),
    "metadata twice": _header(
        b'{"__metadata__":{},"__metadata__":{},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "an array": _header(b"[]"),
    "nesting without end": _header(b'{"a":' + b"[" * 500_000 + b"}"),
    "something after the header": _header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} {}'),
    "no end": _header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'),
    "a comma too many": _header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}'),
    "a name that is no text": _header(b'{"\xff\xfe":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "a name with a NUL": _header({"a\0b": TENSOR}),
    "a name with half a surrogate pair": _header(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "a name of a megabyte": _header({"a" * MIB: TENSOR}),
    "an empty file": lambda root: (root / "model.safetensors").write_bytes(b"") and None,
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_header_is_refused_fast(folder: Path, attack: str) -> None:
    HOSTILE[attack](folder)
    start = time.thread_time()  # this thread's processor time: a busy machine must not fail the test
    error = refused(folder, ErrorCode.MALFORMED_MODEL)
    assert time.thread_time() - start < 1.0
    assert error.details["file"] == "model.safetensors"


_MEASURED = """
import resource, sys
from pathlib import Path
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    inspect_model(FolderFiles(Path(sys.argv[1])))
except NightpressError as error:
    assert error.code == "malformed_model", error
else:
    raise SystemExit("accepted")
print(peak() - before)
"""


@pytest.mark.parametrize(
    "attack",
    [
        "a header of 120 MB",
        "spaces without end",
        "a million empty tensors in a large file",
        "a hundred thousand and one, disguised",
        "50 MB of metadata",
        "50 MB of metadata keys",
        "nesting without end",
    ],
)
def test_a_hostile_header_costs_little_memory(folder: Path, attack: str) -> None:
    HOSTILE[attack](folder)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024, "KiB more than before"


JSON_BOMBS: dict[str, Callable[[], bytes]] = {
    "empty lists": lambda: b"[" + b"[]," * 5_500_000 + b"[]]",
    "empty objects": lambda: b"[" + b"{}," * 5_500_000 + b"{}]",
    "numbers": lambda: b"[" + b"1.5," * 4_000_000 + b"1]",
    "just fewer lists than are too many": lambda: b"[" + b"[]," * 240_000 + b"[]]",
    "one letter": lambda: b'["' + b"a" * 16_000_000 + b'"]',
    "letters of two bytes": lambda: b'["' + "é".encode() * 8_000_000 + b'"]',
    "one letter of four bytes among many of one": lambda: b'["' + "🙂".encode() + b"a" * 15_000_000 + b'"]',
    "halves of surrogate pairs": lambda: b'["' + b"\\ud800" * 2_600_000 + b'"]',
    "depth": lambda: b"[" * 16_000_000,
    "a long number": lambda: b"[" + b"9" * 16_000_000 + b"]",
}


@pytest.mark.parametrize("bomb", JSON_BOMBS)
def test_json_beside_a_model_costs_little(folder: Path, bomb: str) -> None:
    data = JSON_BOMBS[bomb]()
    for number in range(7):
        (folder / f"x{number}.json").write_bytes(data)
    start = time.thread_time()
    refused(folder, ErrorCode.MALFORMED_MODEL)
    assert time.thread_time() - start < slowness()
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024, "KiB more than before"


def test_as_much_json_as_real_models_have_is_read(folder: Path) -> None:
    """A vocabulary with scores, as sentence-transformers stores it, and a tokenizer config with 20,000 added tokens."""
    (folder / "unigram.json").write_text(json.dumps([["▁word", -1.5]] * 250_000))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(n): {"content": f"<{n}>", "special": True} for n in range(20_000)}})
    )
    inspect_model(FolderFiles(folder))


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


def test_a_folder_of_endless_files_is_refused(folder: Path) -> None:
    for number in range(2001):
        (folder / f"{number}.txt").touch()
    refused(folder, ErrorCode.MALFORMED_MODEL)


@pytest.mark.parametrize(
    "kind", ["link to a file", "link to a folder", "link up and back", "named pipe", "dangling link"]
)
def test_nothing_leads_out_of_a_folder(folder: Path, kind: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "vocab.txt").write_text("secret")
    path = folder / "vocab.txt"
    if kind == "link to a file":
        path.symlink_to(outside / "vocab.txt")
    elif kind == "link to a folder":
        (folder / "sub").symlink_to(outside)
    elif kind == "link up and back":
        (outside / "back").symlink_to(folder)
        path.symlink_to(outside / "vocab.txt")
    elif kind == "named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / "nothing")
    with pytest.raises(NightpressError) as error:
        FolderFiles(folder).names()
    assert error.value.code is ErrorCode.PATH_NOT_ALLOWED
    with pytest.raises(NightpressError):
        FolderFiles(folder).read("../outside/vocab.txt", 0, 10)


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

# S3 ------------------------------------------------------------------------------------------------------------------


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


# S10 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3_server: S3) -> str:
    return s3_server.create_bucket()


@pytest.fixture
def store(s3_server: S3, bucket: str) -> ObjectStore:
    return open_store(
        Settings(
            _env_file=None,
            storage_url=f"s3://{bucket}",
            s3_endpoint_url=s3_server.endpoint,
            s3_access_key_id=SecretStr(s3_server.access_key),
            s3_secret_access_key=SecretStr(s3_server.secret_key),
        )
    )


def _sha(data: bytes) -> str:
    return sha256(data).hexdigest()


def test_a_presigned_part_is_for_these_bytes_alone(store: ObjectStore) -> None:
    data = b"the announced bytes"
    upload = store.begin_upload("models/m/w", sha256=_sha(data), signed_parts=True)
    signed = store.presign_part("models/m/w", upload, 1, size=len(data), sha256=_sha(data))
    assert signed is not None

    def put(body: bytes, url: str = signed.url, **headers: str) -> int:
        return httpx.put(url, content=body, headers={**signed.headers, **headers}).status_code

    longer, other = data + b"!", bytes(reversed(data))
    assert put(longer, **{"Content-Length": str(len(longer))}) >= 400
    assert put(other) >= 400
    own = store.presign_part("models/m/w", upload, 1, size=len(data), sha256=_sha(other))
    assert own is not None
    assert put(other, **{"x-amz-checksum-sha256": own.headers["x-amz-checksum-sha256"]}) >= 400
    assert put(data, url=signed.url.replace("models/m/w", "models/other/w")) >= 400
    assert put(data, url=signed.url.replace("partNumber=1", "partNumber=2")) >= 400
    assert httpx.get(signed.url).status_code >= 400
    assert httpx.delete(signed.url).status_code >= 400
    assert store.received_parts("models/m/w", upload) == {}
    assert put(data) == 200
    store.complete_upload("models/m/w", upload, size=len(data), sha256=_sha(data), part_sha256=[_sha(data)])
    assert put(data) >= 400, "an upload that is complete takes nothing more"
    assert b"".join(store.read("models/m/w")) == data


def test_a_presigned_url_expires(store: ObjectStore) -> None:
    store.put_bytes("k", b"x")
    url = store.presign_get("k", filename="k", expires_s=1)
    upload = store.begin_upload("u", sha256=_sha(b"x"), signed_parts=True)
    part = store.presign_part("u", upload, 1, size=1, sha256=_sha(b"x"), expires_s=1)
    assert url is not None
    assert part is not None
    time.sleep(2.1)
    assert httpx.get(url).status_code >= 400
    assert httpx.put(part.url, content=b"x", headers=part.headers).status_code >= 400
    assert store.received_parts("u", upload) == {}


def test_a_presigned_url_lists_nothing(store: ObjectStore, s3_server: S3, bucket: str) -> None:
    store.put_bytes("k", b"x")
    url = store.presign_get("k", filename="k")
    assert url is not None
    query = url.split("?", 1)[1]
    assert httpx.get(f"{s3_server.endpoint}/{bucket}?{query}").status_code >= 400
    assert httpx.get(f"{s3_server.endpoint}/{bucket}?list-type=2").status_code >= 400
    assert httpx.get(f"{s3_server.endpoint}/{bucket}/k").status_code >= 400


def test_parts_without_a_signed_hash_are_still_verified_before_the_object_counts(store: ObjectStore) -> None:
    data = os.urandom(5 * MIB + 10)
    upload = store.begin_upload("models/m/w", sha256=_sha(data), signed_parts=False)
    tampered = b"!" + data[1:]
    for number, piece in enumerate((tampered[: 5 * MIB], tampered[5 * MIB :]), start=1):
        signed = store.presign_part("models/m/w", upload, number, size=len(piece), sha256=None)
        assert signed is not None
        assert httpx.put(signed.url, content=piece, headers=signed.headers, timeout=30).status_code == 200
    with pytest.raises(NightpressError) as error:
        store.complete_upload("models/m/w", upload, size=len(data), sha256=_sha(data))
    assert error.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert store.stat("models/m/w") is None
