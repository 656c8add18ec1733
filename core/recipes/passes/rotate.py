"""The options of `rotate`."""

import re
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, rotating_cost
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions

#: Decoders whose blocks read the residual stream through RMSNorms alone, and add to it with nothing behind their linear layers.
ROTATABLE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
HEAD = "lm_head.weight"
TABLE = "model.embed_tokens.weight"
LAST_NORM = "model.norm.weight"
UNREAD = ".inv_freq"  #: end of the names of buffers that older versions of transformers stored, and no model reads
_OF_A_BLOCK = re.compile(
    r"model\.layers\.\d+\.(self_attn\.([qkvo]_proj\.(weight|bias)|[qk]_norm\.weight)"
    r"|mlp\.(gate|up|down)_proj\.(weight|bias)|(input|post_attention)_layernorm\.weight)"
)


class Rotate(PassOptions):
    """Rotate the hidden states by a random Hadamard matrix that is merged into the weights (QuaRot, arXiv 2404.00456; SpinQuant, 2405.16406).

    The model answers the same, and outliers are spread over all inputs of a layer, so that rounding after this pass may lose less. Norms
    are folded into the layers behind them. A tied output head becomes a matrix of its own.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset(
        {"safetensors", "compressed-tensors", "onnx", "openvino", "gguf", "mlx"}
    )

    pass_: Literal["rotate"] = Field("rotate", alias="pass")
    values: bool = Field(
        True, description="Also rotate what each attention head passes on, between `v_proj` and `o_proj`."
    )

    def describe(self) -> str:
        return "random Hadamard" + (", values too" if self.values else "")

    def check(self, header: ModelHeader) -> None:
        if header.model_type not in ROTATABLE or not header.is_decoder:
            raise invalid(
                f"`rotate` can't take a {header.model_type}: it needs a decoder of RMSNorms with nothing behind its layers.",
                f"Leave it out; it takes {', '.join(sorted(ROTATABLE))}.",
            )
        names = {tensor.name for tensor in header.tensors}
        for tensor in header.tensors:
            if tensor.name.endswith(UNREAD):
                continue
            known = tensor.name in {HEAD, TABLE, LAST_NORM} or _OF_A_BLOCK.fullmatch(tensor.name)
            if not known or tensor.dtype not in {"F32", "F16", "BF16"}:
                raise invalid(
                    f"`rotate` does not know what to do with {tensor.name}.", "Put `rotate` first, or leave it out."
                )
        if not {TABLE, LAST_NORM} <= names:
            raise invalid(
                "`rotate`: the model has no embeddings, or no last norm, under their usual names.", "Leave it out."
            )

    def leaves(self, header: ModelHeader) -> ModelHeader:
        tensors: list[TensorInfo] = []
        for tensor in header.tensors:
            tensors.append(tensor)
            if tensor.name == TABLE and is_tied(header):
                tensors.append(replace(tensor, name=HEAD))
        config = {**header.config, "tie_word_embeddings": False}
        return header.model_copy(update={"tensors": tuple(tensors), "config": config})

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return rotating_cost(header)


def is_tied(header: ModelHeader) -> bool:
    """Return whether the output head uses the matrix of the embeddings: the files hold no other."""
    return all(tensor.name != HEAD for tensor in header.tensors)
