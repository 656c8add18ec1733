"""The exports that a recipe may name: formats, number types, and the models that each format can carry. No torch here."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

from nightpress.core.recipes.exceptions import why_not
from nightpress.core.recipes.gguf_types import GGUF_TYPES
from nightpress.core.recipes.graphs import why_no_graph
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.llama_converter import by_converter
from nightpress.core.recipes.llama_cpp import why_not_llama_cpp
from nightpress.core.recipes.mlx import why_not_mlx
from nightpress.core.recipes.passes.base import ExportFormat

GRAPH_FORMATS = frozenset({"onnx", "openvino", "transformers.js"})
#: Formats that transformers loads. Only it can run a model on a GPU here.
TORCH_FORMATS = frozenset({"safetensors", "compressed-tensors"})

#: Format → the number types that its weights can have; the first is the default, and that of an uncompressed model. Formats that are not listed keep the model's types.
TYPES: Mapping[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16"),
    "openvino": ("fp32", "fp16"),
    "transformers.js": ("fp32", "fp16"),
    "gguf": ("f16", "f32", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
}
#: Bytes of XML in an OpenVINO graph for a matrix and the operations around it. Measured: 6,000 in float to 12,000 in static int8.
_TEXT_BYTES = 7000
#: GGUF type → bits per weight, scales included.
GGUF_BITS: Mapping[str, float] = {"f32": 32, "f16": 16} | {
    name: kind.bits_per_weight for name, kind in GGUF_TYPES.items() if kind.even
}


class Export(BaseModel):
    """A format, and the number type of its weights. In a recipe, `onnx` is short for `{format: onnx}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    format: ExportFormat
    type: str | None = None
    speed: float | None = None  #: which of the models that `shape-to-speed` makes; None: there is one model

    @property
    def name(self) -> str:
        """The name of the artifact and of its folder, e.g. `onnx`, `onnx-fp16`, `onnx-4x`."""
        speed = None if self.speed is None else speed_name(self.speed)
        return "-".join(part for part in (self.format, self.type, speed) if part is not None)

    @property
    def carrier(self) -> ExportFormat:
        """The format that a pass's result must support: `onnx` for transformers.js, which reads ONNX graphs; else the format itself."""
        return "onnx" if self.format == "transformers.js" else self.format

    @property
    def weights(self) -> str | None:
        """The number type of weights that no pass has rounded; None: their own type."""
        known = TYPES.get(self.format)
        return self.type or (known[0] if known else None)

    @property
    def uncompressed(self) -> "Export | None":
        """The export of the uncompressed model to the same runtime, which the artifact's speed is compared with; None: transformers runs the source itself."""
        return None if self.format in TORCH_FORMATS else Export(format=self.format)

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, raw: object) -> object:
        return {"format": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _known_type(self) -> "Export":
        known = TYPES.get(self.format, ())
        if self.type is not None and self.type not in known:
            raise ValueError(
                f"{self.format} has no type {self.type!r}; there are {', '.join(known)}"
                if known
                else f"{self.format} takes no type: it keeps the model's own"
            )
        return self

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        more = {key: value for key in ("type", "speed") if (value := getattr(self, key)) is not None}
        return {"format": self.format, **more} if more else self.format

    def stored_bytes(self, tensor: TensorInfo) -> int:
        """Return the bytes of a tensor that no pass has rounded."""
        if self.weights is None:
            return tensor.size
        bits = GGUF_BITS.get(self.weights, 32 if self.weights == "fp32" else 16)
        return round(math.prod(tensor.shape) * (32 if len(tensor.shape) < 2 else bits) / 8)

    def text_bytes(self, tensor: TensorInfo) -> int:
        """Return the bytes that a graph's text takes for a tensor's operations, in addition to its stored numbers."""
        return _TEXT_BYTES if self.format == "openvino" and len(tensor.shape) == 2 else 0

    def check(self, header: ModelHeader) -> None:
        """Raise NightpressError(invalid_recipe) if the format can't carry this model. The hint names the exports that can."""
        why = _refusal(self, header)
        if why is not None:
            others = [name for name in (*TYPES, "safetensors") if _refusal(Export(format=name), header) is None]
            raise invalid(f"exports: {self.name} can't take this model: {why}.", f"Use {', '.join(others)}.")


def speed_name(speed: float) -> str:
    """Return e.g. `4x`."""
    return f"{speed:g}x"


def runs_in_llama_cpp(header: ModelHeader) -> bool:
    """Return whether llama.cpp takes the codes of this model that a pass chose."""
    return _refusal(Export(format="gguf"), header) is None and not by_converter(header)


def _refusal(export: Export, header: ModelHeader) -> str | None:
    kind = header.model_type
    if (why := why_not(export.format, header)) is not None:
        return why
    if export.format in GRAPH_FORMATS and (why := why_no_graph(header)) is not None:
        return why
    if export.format == "transformers.js" and (header.task == "seq2seq" or header.sees_images):
        return "only models of text in a single graph were run there"
    if export.carrier == "onnx" and kind == "falcon" and header.config.get("alibi"):
        return "transformers multiplies alibi's slopes in bfloat16, which ONNX Runtime has no product for"
    if export.format == "mlx":
        return why_not_mlx(header)
    return why_not_llama_cpp(header) if export.format == "gguf" else None
