"""Checkpoints of codes, as other libraries write them, are read as the floats that these libraries read in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nightpress.core.compress.executors import open_source as opening
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.stored_forms import BESIDE, MODULE, WEIGHT, opened, pack_awq, pack_gptq, write_checkpoint

# torch warns that it will remove a dtype that the libraries use for scales.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a weight, of odd numbers of rows."""
    monkeypatch.setattr(opening, "_CHUNK", 5 * 4 * 256)


def weight(rows: int = 48, columns: int = 256) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(rows, columns) * torch.linspace(0.1, 3, rows)[:, None]


def check_header(folder: Path, shape: tuple[int, ...], method: str, dtype: str = "BF16") -> None:
    """The header describes the floats, from names and shapes alone."""
    header = inspect_model(FolderFiles(folder))
    described = {tensor.name: (tensor.shape, tensor.dtype) for tensor in header.tensors}
    assert described.keys() == {*BESIDE, WEIGHT}
    assert described[WEIGHT] == (shape, dtype)
    assert header.brought is not None
    assert (header.brought.method, header.brought.weights) == (method, 1)
    assert header.brought.size < header.size
    assert "quantization_config" not in header.config


# fp8 of transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scale", "block"),
    [
        ((256, 384), (2, 3), [128, 128]),
        ((48, 256), (48, 1), None),
        ((48, 256), (1,), None),
        ((48, 256), (), None),
        ((4, 128, 256), (4, 1, 2), [128, 128]),
    ],
)
def test_fp8_is_read_as_transformers_reads_it(
    tmp_path: Path, shape: tuple[int, ...], scale: tuple[int, ...], block: Any
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    codes = torch.randn(shape).mul(40).to(torch.float8_e4m3fn)
    scales = torch.rand(scale) * 0.01
    tensors = {WEIGHT: codes, f"{WEIGHT}_scale_inv": scales, f"{MODULE}.activation_scale": torch.ones(1)}
    folder = write_checkpoint(tmp_path / "m", tensors, {"quant_method": "fp8", "weight_block_size": block})
    check_header(folder, shape, "fp8")
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert torch.equal(opened(folder)[WEIGHT], expected)


def test_blocks_at_the_edge_may_be_smaller(tmp_path: Path) -> None:
    codes = torch.ones(300, 200).to(torch.float8_e4m3fn)
    scales = torch.arange(6.0).view(3, 2)
    tensors = {WEIGHT: codes, f"{WEIGHT}_scale_inv": scales}
    folder = write_checkpoint(tmp_path / "m", tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    expected = scales.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(opened(folder)[WEIGHT].float(), expected)


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = torch.randint(0, 256, (3, 24, 4, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (3, 24, 4), dtype=torch.uint8)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(3, 24).bfloat16()}
    folder = write_checkpoint(tmp_path / "m", tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    found = opened(folder)
    assert found.keys() == {name, f"{name}_bias"}
    assert torch.equal(found[name], convert_moe_packed_tensors(blocks, scales))
    assert {tensor.name: tensor.shape for tensor in inspect_model(FolderFiles(folder)).tensors}[name] == (3, 128, 24)


# compressed-tensors -------------------------------------------------------------------------------------------------

_INT = {"type": "int", "dynamic": False}
_FLOAT = {"type": "float", "dynamic": False, "symmetric": True}
_INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
#: format → (arguments of the weights, of the inputs)
COMPRESSED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int4 in groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True, **_INT}, None),
    "int4 with zero points": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False, **_INT}, None),
    "int4 a row": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": True, **_INT}, None),
    "int3": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False, **_INT}, None),
    "int8 packed": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False, **_INT}, None),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True, **_INT}, _INPUTS),
    "w8a8 with zero points": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False, **_INT}, _INPUTS),
    "fp8 a tensor": ("float-quantized", {"num_bits": 8, "strategy": "tensor", **_FLOAT}, None),
    "fp8 a row": ("float-quantized", {"num_bits": 8, "strategy": "channel", **_FLOAT}, None),
    "fp8 in blocks": ("float-quantized", {"num_bits": 8, "strategy": "block", "block_structure": [128, 128], **_FLOAT}, None),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, **_FLOAT}, None),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, **_FLOAT}, None),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", **_FLOAT}, None),
}  # fmt: skip


@pytest.mark.parametrize("form", COMPRESSED)
def test_compressed_tensors_are_read_as_their_library_reads_them(tmp_path: Path, form: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    name, arguments, inputs = COMPRESSED[form]
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=inputs)
    floats, strategy = weight(), arguments["strategy"]
    if strategy == "block":
        views = torch.nn.functional.pad(floats, (0, 0, 0, 80)).view(1, 128, 2, 128).transpose(1, 2)
        low, high = views.amin((2, 3)), views.amax((2, 3))
    elif strategy in {"group", "tensor_group"}:
        grouped = floats.view(len(floats), -1, arguments["group_size"])
        low, high = grouped.amin(2), grouped.amax(2)
    elif strategy == "channel":
        low, high = floats.amin(1, keepdim=True), floats.amax(1, keepdim=True)
    else:
        low, high = floats.min().view(1), floats.max().view(1)
    state = {}
    if form == "nvfp4":
        state["weight_global_scale"] = (448 * 6 / floats.abs().max()).view(1)
    scale, zero_point = calculate_qparams(low, high, scheme.weights, global_scale=state.get("weight_global_scale"))
    if scale.dtype == torch.float32:
        scale = scale.bfloat16()
    state |= {"weight": floats.bfloat16(), "weight_scale": scale, "weight_zero_point": zero_point}
    if arguments.get("symmetric", True):
        del state["weight_zero_point"]
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    groups = {"group_0": {"targets": ["Linear"], "weights": arguments, "input_activations": inputs, "format": name}}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
    tensors = {f"{MODULE}.{leaf}": tensor.contiguous() for leaf, tensor in stored.items()}
    folder = write_checkpoint(tmp_path / "m", tensors, quantization)
    check_header(folder, (48, 256), "compressed-tensors")
    found = opened(folder)
    assert found.keys() == {WEIGHT}
    if form == "nvfp4":  # the library divides the scales in bfloat16
        torch.testing.assert_close(found[WEIGHT], expected.bfloat16(), rtol=2**-6, atol=0)
    else:
        assert torch.equal(found[WEIGHT], expected.bfloat16())
    assert not torch.equal(found[WEIGHT], floats.bfloat16()), "the codes were read, not the floats"


def test_columns_that_were_sorted_find_their_groups(tmp_path: Path) -> None:
    """Act-order: `weight_g_idx` names each column's group."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    torch.manual_seed(0)
    codes, scale = torch.randint(-8, 8, (6, 64), dtype=torch.int8), torch.rand(6, 2).bfloat16()
    index = torch.randperm(64) % 2
    tensors = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([6, 64]),
        "weight_g_idx": index.int(),
    }
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
        "actorder": "group",
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    folder = write_checkpoint(
        tmp_path / "m", {f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()}, quantization
    )
    assert torch.equal(opened(folder)[WEIGHT], codes.bfloat16() * scale[:, index])


def test_a_width_that_is_no_multiple_of_the_words_is_read_from_its_tensor(tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    codes = (torch.arange(5 * 27) % 16 - 8).view(5, 27).to(torch.int8)
    tensors = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": torch.ones(5, 1),
        "weight_shape": torch.tensor([5, 27]),
    }
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    folder = write_checkpoint(
        tmp_path / "m", {f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()}, quantization
    )
    check_header(folder, (5, 27), "compressed-tensors")
    assert torch.equal(opened(folder)[WEIGHT].float(), codes.float())


# GPTQ and AWQ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("form", "sorted_columns"), [("gptq", False), ("gptq", True), ("gptq_v2", False)])
def test_gptq_is_read_as_autogptq_writes_it(tmp_path: Path, bits: int, form: str, sorted_columns: bool) -> None:
    """W = (q − z) · s, with codes packed along the inputs. The first format stores z − 1."""
    torch.manual_seed(0)
    inputs, outputs, group = 96, 64, 32
    codes = torch.randint(0, 2**bits, (inputs, outputs))
    zeros = torch.randint(1, 2**bits, (inputs // group, outputs))
    scales = torch.rand(inputs // group, outputs).half()
    index = torch.arange(inputs) // group
    index = index[torch.randperm(inputs)] if sorted_columns else index
    stored = zeros - 1 if form == "gptq" else zeros
    tensors = {
        "qweight": pack_gptq(codes, bits),
        "qzeros": pack_gptq(stored.t(), bits).t().contiguous(),
        "scales": scales,
        "g_idx": index.int(),
    }
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": form, "sym": False}
    folder = write_checkpoint(
        tmp_path / "m", {f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()}, quantization, dtype="float16"
    )
    check_header(folder, (outputs, inputs), "gptq", "F16")
    expected = ((codes - zeros[index]).float() * scales.float()[index]).t().half()
    assert torch.equal(opened(folder)[WEIGHT], expected)


@pytest.mark.parametrize("zero_point", [True, False])
def test_awq_is_read_as_compressed_tensors_reads_it(tmp_path: Path, zero_point: bool) -> None:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    torch.manual_seed(0)
    inputs, outputs, group = 128, 40, 32
    codes, zeros = torch.randint(0, 16, (inputs, outputs)), torch.randint(0, 16, (inputs // group, outputs))
    scales = torch.rand(inputs // group, outputs).half()
    tensors = {"qweight": pack_awq(codes), "scales": scales} | ({"qzeros": pack_awq(zeros)} if zero_point else {})
    theirs = AutoAWQConverter(group_size=group, zero_point=zero_point)._convert_gemm_module(
        tensors["qweight"], scales, tensors.get("qzeros")
    )
    signed, scale, point = theirs
    wide = scale.float().repeat_interleave(group, 1)
    expected = (signed.float() - (point.float().repeat_interleave(group, 1) if point is not None else 0)) * wide
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": zero_point}
    folder = write_checkpoint(
        tmp_path / "m", {f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()}, quantization, dtype="float16"
    )
    check_header(folder, (outputs, inputs), "awq", "F16")
    assert torch.equal(opened(folder)[WEIGHT], expected.half())


# ModelOpt and bitsandbytes ------------------------------------------------------------------------------------------


def test_nvfp4_of_modelopt_multiplies_by_its_second_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (6, 32), dtype=torch.uint8)
    scale, second = (torch.rand(6, 4) * 400).to(torch.float8_e4m3fn), torch.tensor(0.003)
    tensors = {
        WEIGHT: packed,
        f"{WEIGHT}_scale": scale,
        f"{WEIGHT}_scale_2": second,
        f"{MODULE}.input_scale": torch.tensor(1.0),
    }
    folder = write_checkpoint(tmp_path / "m", tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = numbers[torch.stack((packed & 15, packed >> 4), -1).view(6, 64).int()]
    expected = codes * (scale.float() * second).repeat_interleave(16, 1)
    assert torch.equal(opened(folder)[WEIGHT], expected.bfloat16())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("columns", [256, 129])
def test_four_bits_of_bitsandbytes_are_read_as_it_reads_them(
    tmp_path: Path, kind: str, nested: bool, columns: int
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    floats = weight(48, columns).bfloat16()
    packed, state = functional.quantize_4bit(floats, quant_type=kind, compress_statistics=nested)
    expected = functional.dequantize_4bit(packed, state)
    tensors = {WEIGHT: packed, **{f"{WEIGHT}.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}}
    folder = write_checkpoint(tmp_path / "m", tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    check_header(folder, (48, columns), "bitsandbytes")
    found = opened(folder)
    assert found.keys() == {WEIGHT}
    torch.testing.assert_close(found[WEIGHT], expected, rtol=2**-7, atol=0)


def test_int8_of_bitsandbytes_is_read_as_it_reads_it(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    codes, scales, _ = functional.int8_vectorwise_quant(weight().half())
    tensors = {WEIGHT: codes, f"{MODULE}.SCB": scales, f"{MODULE}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    folder = write_checkpoint(
        tmp_path / "m", tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, dtype="float16"
    )
    check_header(folder, (48, 256), "bitsandbytes", "F16")
    expected = functional.int8_vectorwise_dequant(codes, scales).half()
    torch.testing.assert_close(opened(folder)[WEIGHT], expected, rtol=2**-10, atol=0)


# What is not read ---------------------------------------------------------------------------------------------------


def test_a_config_left_over_beside_floats_is_noticed(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "m", {WEIGHT: weight().half(), "ids": torch.arange(9)[None]}, {"quant_method": "gptq", "bits": 4}
    )
    header = inspect_model(FolderFiles(folder))
    assert header.brought is not None
    assert header.brought.weights == 0
    assert torch.equal(opened(folder)[WEIGHT], weight().half())


@pytest.mark.parametrize(
    ("tensors", "quantization", "code", "said"),
    [
        ({WEIGHT: torch.ones(4, 64).to(torch.int8)}, {"quant_method": "quanto"}, ErrorCode.UNSUPPORTED_FORMAT, "'quanto', which is not read"),
        ({WEIGHT: torch.ones(4, 64).to(torch.int8)}, {"quant_method": "fp8"}, ErrorCode.UNSUPPORTED_FORMAT, "none of its tensors"),
        ({f"{MODULE}.qweight": torch.ones(8, 8).int()}, {"quant_method": "gptq", "bits": 5}, ErrorCode.UNSUPPORTED_FORMAT, "2, 3, 4 and 8"),
        ({f"{MODULE}.qweight": torch.ones(8, 8).int()}, {"quant_method": "gptq", "bits": [4]}, ErrorCode.UNSUPPORTED_FORMAT, "2, 3, 4 and 8"),
        ({f"{MODULE}.qweight": torch.ones(8, 8).int()}, {"quant_method": "gptq", "bits": 4}, ErrorCode.MALFORMED_MODEL, "scales is not there"),
        ({f"{MODULE}.qweight": torch.ones(8, 8).int()}, {"quant_method": "awq", "version": "gemv"}, ErrorCode.UNSUPPORTED_FORMAT, "layout `gemm`"),
        (
            {WEIGHT: torch.ones(4, 64).to(torch.float8_e4m3fn), f"{WEIGHT}_scale_inv": torch.ones(1), "a.weight": torch.ones(4, 64).to(torch.float8_e4m3fn)},
            {"quant_method": "fp8"},
            ErrorCode.MALFORMED_MODEL,
            "a.weight seems to hold codes",
        ),
        (
            {WEIGHT: torch.ones(64, 1).to(torch.uint8), f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(b'{"shape": [1, -2]}'), dtype=torch.uint8)},
            {"quant_method": "bitsandbytes"},
            ErrorCode.MALFORMED_MODEL,
            "can't be read",
        ),
        ({WEIGHT: torch.ones(4, 64)}, ["gptq"], ErrorCode.MALFORMED_MODEL, "not an object"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_told(tmp_path: Path, tensors: Any, quantization: Any, code: ErrorCode, said: str) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors, quantization)
    with pytest.raises(NightpressError) as error:
        inspect_model(FolderFiles(folder))
    assert error.value.code is code
    assert said in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("scale", [(3, 2), (5,), (2, 2, 2), (4, 0)])
def test_scales_that_do_not_fit_are_refused_when_they_are_read(tmp_path: Path, scale: tuple[int, ...]) -> None:
    tensors = {WEIGHT: torch.ones(4, 64).to(torch.float8_e4m3fn), f"{WEIGHT}_scale_inv": torch.ones(scale)}
    folder = write_checkpoint(tmp_path / "m", tensors, {"quant_method": "fp8"})
    with pytest.raises(NightpressError, match="can't be read") as error:
        opened(folder)
    assert error.value.code is ErrorCode.MALFORMED_MODEL


def test_parts_in_other_shards_are_found(tmp_path: Path) -> None:
    codes, scales = torch.ones(4, 64).to(torch.float8_e4m3fn), torch.arange(4.0)[:, None]
    folder = write_checkpoint(tmp_path / "m", {}, {"quant_method": "fp8"})
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({WEIGHT: codes}, folder / "b.safetensors")
    save_file({f"{WEIGHT}_scale_inv": scales}, folder / "c.safetensors")
    index = {**dict.fromkeys(BESIDE, "a.safetensors"), WEIGHT: "b.safetensors", f"{WEIGHT}_scale_inv": "c.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    target = tmp_path / "out"
    opening.open_source(folder, target, lambda _fraction, _what: None)
    assert {path.name for path in target.glob("*.safetensors")} == {"a.safetensors", "b.safetensors"}
    header = inspect_model(FolderFiles(target))
    assert {tensor.name for tensor in header.tensors} == {*BESIDE, WEIGHT}
    assert header.brought is None
