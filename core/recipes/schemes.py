"""Quantization schemes in the formats of compressed-tensors: a single definition for estimates, writers and loaders."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from nightpress.core.recipes.header import TensorInfo

Kind = Literal["int", "float"]
Strategy = Literal["tensor", "channel", "group", "block"]

BLOCK = 128  #: rows and columns that share a scale under the strategy `block`; inputs that share one where they are fp8 and weights fp4
_SCALE_DTYPES = {"mxfp4-pack-quantized": "torch.uint8", "nvfp4-pack-quantized": "torch.float8_e4m3fn"}
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class Activations:
    """How a runtime rounds a layer's inputs before the product: to numbers of the same kind (int or float) as the weights.

    Inputs of fp4 weights are rounded in groups, at run time: to e2m1 as the weights are, or to e4m3 with a scale for each 128 of a token.
    """

    static: bool = (
        False  #: True: one scale per layer, from calibration; False: one scale per token or group, at run time
    )
    bits: Literal[4, 8] = 8


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored, and how a runtime rounds its inputs."""

    bits: int
    kind: Kind = "int"  #: "int", or "float": e4m3 (8 bits) or e2m1 (4 bits)
    strategy: Strategy = "channel"  #: which weights share a scale; a channel is an output, i.e. a row
    group_size: int | None = None  #: number of inputs that share a scale; only for the strategy `group`
    symmetric: bool = True  #: False: with zero points
    activations: Activations | None = None  #: None: inputs stay in float

    @property
    def is_fp4(self) -> bool:
        """Whether the codes are numbers of e2m1."""
        return self.kind == "float" and self.bits == 4

    @property
    def has_global_scale(self) -> bool:
        """Whether the scales are divided by one number of the whole weight."""
        return self.format == "nvfp4-pack-quantized"

    @property
    def has_input_global_scale(self) -> bool:
        """Whether the scales of the rounded inputs are divided by one number of the layer, found by calibration."""
        return self.has_global_scale and self.activations is not None

    @property
    def format(self) -> str:
        """The format's name in compressed-tensors."""
        if self.kind == "float":
            if self.bits == 8:
                return "float-quantized"
            return "mxfp4-pack-quantized" if self.group_size == 32 else "nvfp4-pack-quantized"
        return "pack-quantized" if self.activations is None else "int-quantized"

    def describe(self) -> str:
        number = f"int{self.bits}" if self.kind == "int" else {8: "fp8", 4: self.format[:5].rstrip("-")}[self.bits]
        shared = {
            "tensor": "a scale a tensor",
            "channel": "a scale a row",
            "group": f"groups of {self.group_size}",
            "block": f"a scale for {BLOCK} × {BLOCK}",
        }[self.strategy]
        return f"{number}, {shared}{self._inputs_described()}"

    def _inputs_described(self) -> str:
        if self.activations is None:
            return ""
        if self.is_fp4:
            return f", inputs in fp{self.activations.bits}"
        return ", inputs too, " + ("static" if self.activations.static else "by token")

    def groups(self, columns: int) -> int:
        """Return the number of scales in a row of `columns` inputs."""
        if self.strategy == "group":
            assert self.group_size is not None
            return columns // self.group_size
        return -(-columns // BLOCK) if self.strategy == "block" else 1

    def outputs(self, tensor: TensorInfo) -> tuple[TensorInfo, ...]:
        """Return the tensors that replace a weight [out, in]. Each is named `<weight>_<part>`; unpacked codes have the weight's own name.

        The static scale of inputs is named `<module>.input_scale`, nvfp4's `<module>.input_global_scale`.
        """
        rows, columns = tensor.shape
        groups, name = self.groups(columns), tensor.name

        def info(part: str, dtype: str, *shape: int) -> TensorInfo:
            return TensorInfo(name=name + part, dtype=dtype, shape=shape, size=math.prod(shape) * _WIDTHS[dtype])

        if self.format == "mxfp4-pack-quantized":
            return info("_packed", "U8", rows, columns // 2), info("_scale", "U8", rows, groups)
        if self.format == "nvfp4-pack-quantized":
            scales = [info("_scale", "F8_E4M3", rows, groups), info("_global_scale", "F32", 1)]
            if self.has_input_global_scale:
                scales.append(
                    TensorInfo(name=name.removesuffix("weight") + "input_global_scale", dtype="F32", shape=(1,), size=4)
                )
            return info("_packed", "U8", rows, columns // 2), *scales
        if self.format == "pack-quantized":
            packed = info("_packed", "I32", rows, -(-columns * self.bits // 32))
            outputs = [packed, info("_scale", tensor.dtype, rows, groups), info("_shape", "I64", 2)]
            if not self.symmetric:  # a word holds the zero points of several rows
                outputs.append(info("_zero_point", "I32", -(-rows * self.bits // 32), groups))
            return tuple(outputs)
        scale_shape = {"tensor": (1,), "channel": (rows, 1), "block": (-(-rows // BLOCK), groups)}[self.strategy]
        outputs = [info("", "I8" if self.kind == "int" else "F8_E4M3", rows, columns)]
        outputs.append(info("_scale", tensor.dtype, *scale_shape))
        if self.activations is not None and self.activations.static:
            scale = TensorInfo(
                name=name.removesuffix("weight") + "input_scale",
                dtype=tensor.dtype,
                shape=(1,),
                size=_WIDTHS[tensor.dtype],
            )
            outputs.append(scale)
        return tuple(outputs)

    def stored_bytes(self, tensor: TensorInfo) -> int:
        return sum(output.size for output in self.outputs(tensor))

    def weight_arguments(self) -> dict[str, Any]:
        """Return the `weights` of a config group in a quantization_config."""
        strategy = "tensor_group" if self.has_global_scale else self.strategy
        return {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": strategy,
            "group_size": self.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": [BLOCK, BLOCK] if self.strategy == "block" else None,
            "observer": "minmax",
            "observer_kwargs": {},
        } | ({"scale_dtype": _SCALE_DTYPES[self.format]} if self.format in _SCALE_DTYPES else {})

    def activation_arguments(self) -> dict[str, Any] | None:
        """Return the `input_activations` of a config group in a quantization_config; None: inputs stay in float."""
        if self.activations is None:
            return None
        if self.is_fp4:
            return self._grouped_inputs(self.activations)
        by_token = not self.activations.static
        # Weights with a scale per 128 × 128 need inputs with a scale per 128: the kernels multiply block by block.
        group = BLOCK if by_token and self.strategy == "block" else None
        return {
            "num_bits": 8,
            "type": self.kind,
            "symmetric": True,
            "strategy": "tensor" if not by_token else "group" if group else "token",
            "group_size": group,
            "dynamic": by_token,
            "actorder": None,
            "block_structure": None,
            "observer": None if by_token else "minmax",
            "observer_kwargs": {},
        }

    def _grouped_inputs(self, activations: Activations) -> dict[str, Any]:
        """As the schemes NVFP4, MXFP4 and MXFP4XFP8 of compressed-tensors round them."""
        as_weights = activations.bits == 4
        local = (
            as_weights and self.has_global_scale
        )  # the groups' scales are found at run time, the global one is stored
        return {
            "num_bits": activations.bits,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group" if local else "group",
            "group_size": self.group_size if as_weights else BLOCK,
            "dynamic": "local" if local else True,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax" if local else None,
            "observer_kwargs": {},
        } | ({"scale_dtype": _SCALE_DTYPES[self.format]} if as_weights else {})
