"""Options of the passes for embedders: a table of token vectors in place of the model, and vectors with fewer dimensions."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import MODELLING_BYTES, Cost, stream_cost
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions, Relation

_TOKENS = 3  #: of a text of one word: the token, and usually one special token before and after it
_SIZES = {"float32": ("F32", 4), "float16": ("F16", 2)}


class StaticEmbeddings(PassOptions):
    """Replace an embedder by a table with one vector a token (Model2Vec): a text's vector is the mean of its tokens' vectors.

    Each token goes through the model alone. The vectors are reduced by PCA and weighted by how frequent the token is. The result has no
    layers, and neither word order nor context: it is hundreds of times as fast and loses much of the quality, so measure `retrieval` or
    `similarity`. model2vec and sentence-transformers load the folder.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors"})
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu"})
    last: ClassVar[bool] = True
    runner: ClassVar[str] = "model2vec_runner.py"

    pass_: Literal["static-embeddings"] = Field("static-embeddings", alias="pass")
    dimensions: int | None = Field(
        256, ge=2, le=65_536, description="Principal components that are kept; null: as many as the model's width."
    )
    sif: float | None = Field(
        1e-4,
        gt=0,
        lt=1,
        description="Smooth inverse frequency a: a token's weight is a / (a + p), p by Zipf's law from its place in the vocabulary, which tokenizers order by frequency. null: all weights are 1.",
    )
    type: Literal["float16", "float32"] = Field("float16", description="Number type of the table.")

    def describe(self) -> str:
        return f"a table of token vectors, {self.dimensions or 'all'} dimensions, {self.type}"

    def check(self, header: ModelHeader) -> None:
        check_embedder(self.name, header)
        if header.vocabulary is None:
            raise invalid(f"`{self.name}`: config.json names no `vocab_size`.", "Bring a model that names it.")

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        yield f"`{self.name}` leaves no layers: texts are compared by their words alone. Measure `retrieval` or `similarity` on texts like yours."

    def leaves(self, header: ModelHeader) -> ModelHeader:
        dtype, size = _SIZES[self.type]
        wide = embedding_width(header) or 1
        shape = header.vocabulary or 1, min(self.dimensions or wide, wide)
        table = TensorInfo(name="embeddings", dtype=dtype, shape=shape, size=shape[0] * shape[1] * size)
        config = {"model_type": "model2vec", "vocab_size": shape[0], "hidden_size": shape[1]}
        named = {"model_type": "model2vec", "architecture": "StaticModel", "config": config, "tensors": (table,)}
        return header.model_copy(update=named)

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        rows, width = header.vocabulary or 1, embedding_width(header) or 1
        layers = max(0, header.parameters - rows * width)
        return Cost(MODELLING_BYTES + 4 * header.parameters + 12 * rows * width, 5.0, work=_TOKENS * rows * layers)


def check_embedder(name: str, header: ModelHeader) -> None:
    """Raise NightpressError(invalid_recipe) if the model is no embedder of texts."""
    if header.task != "embedding" or header.sees_images:
        raise invalid(
            f"`{name}` is for embedders of texts, and this model is for {header.task}{' on images' if header.sees_images else ''}.",
            "Leave the pass out, or bring the model without its head.",
        )


def embedding_width(header: ModelHeader) -> int | None:
    """Return the numbers in an embedder's pooled vector; None: the config doesn't say."""
    wide = next(
        (header.text_config[key] for key in ("hidden_size", "dim", "d_model") if key in header.text_config), None
    )
    return wide * len(header.pooling.split("+")) if isinstance(wide, int) else None


class TruncateEmbeddings(PassOptions):
    """Keep the first dimensions of an embedder's vectors, for a model that was trained so that these hold most (Matryoshka, arXiv 2205.13147).

    The weights stay. The folder says it in `truncate_dim`, which sentence-transformers follows, and so do the metrics `retrieval`,
    `similarity` and `neighbours`. A runtime alone returns whole vectors.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors", "compressed-tensors", "onnx", "openvino"})
    relation: ClassVar[Relation] = None

    pass_: Literal["truncate-embeddings"] = Field("truncate-embeddings", alias="pass")
    dimensions: int = Field(ge=1, le=65_536, description="Numbers of a vector that are kept, from its start.")

    def describe(self) -> str:
        return f"the first {self.dimensions} numbers of each vector"

    def check(self, header: ModelHeader) -> None:
        check_embedder(self.name, header)
        wide = embedding_width(header)
        if wide is not None and self.dimensions >= wide:
            raise invalid(
                f"`{self.name}`: {self.dimensions} dimensions are not fewer than the model's {wide}.",
                f"Take at most {wide - 1}.",
            )

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return stream_cost(header)
