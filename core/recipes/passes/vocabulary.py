"""Options of the pass that cuts tokens from a model's vocabulary."""

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from nightpress.core.recipes.calibration import Calibration, ReadRef
from nightpress.core.recipes.costs import Cost, stream_cost
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions, Relation

_OWN_TABLES = ("vision_config", "audio_config", "vocab_size_per_layer_input", "cutoffs")
_NO_TOKENS = re.compile(r"position|token_type|\.\d+\.")  #: tables of other things, and what is inside a block


class Vocabulary(PassOptions):
    """Cut the tokens that your text never needs from the tokenizer, the embeddings and a tied or untied head.

    Text like yours is tokenized as before, and the model's outputs on it are the same. Other text is split more finely: nothing that could be
    written becomes unknown. In multilingual models the vocabulary is often more than half of the weights. The report says how much more
    finely prose is split.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors", "compressed-tensors", "onnx", "openvino"})
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    relation: ClassVar[Relation] = "finetune"
    renumbers: ClassVar[bool] = True

    pass_: Literal["vocabulary"] = Field("vocabulary", alias="pass")
    data: ReadRef = Field(
        description="The text whose tokens are kept: all rows are read. Bring all that you have, also what the model is to write."
    )
    least: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="Times that a token must occur. More than 1: rare words are split more finely.",
    )
    characters: bool = Field(
        True, description="Keep every token of one character. false: characters that the text lacks become unknown."
    )

    def describe(self) -> str:
        return f"only tokens that {self.data} needs"

    def data_refs(self) -> frozenset[str]:
        return frozenset({self.data})

    def check(self, header: ModelHeader) -> None:
        own = [key for key in _OWN_TABLES if key in header.config]
        if own or header.sees_images or not vocabulary_tables(header):
            raise invalid(
                f"`{self.name}` can't take this model: {f'it has {own[0]}, whose tokens have tables of their own' if own else 'no tensor has a row for each token'}.",
                "Leave the pass out.",
            )

    def check_beside(self, passes: Sequence[PassOptions], header: ModelHeader | None) -> None:
        at = list(passes).index(self)
        later = [options.name for options in passes[at + 1 :] if options.needs == "training"]
        if later:
            raise invalid(
                f"`{later[0]}` can't follow `{self.name}`: its teacher knows tokens by other numbers.",
                f"Name `{later[0]}` before `{self.name}`.",
            )

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        yield f"`{self.name}`: how many tokens stay is only known once the text is read, so sizes are estimated as if all stayed."

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return stream_cost(header).then(Cost(0, 10.0))


def vocabulary_tables(header: ModelHeader) -> tuple[TensorInfo, ...]:
    """Return the tensors with a row for each token: embeddings, heads and their biases; also biases [1, vocabulary]."""
    rows = header.vocabulary
    return tuple(
        tensor
        for tensor in header.tensors
        if rows in {tensor.shape[0] if tensor.shape else None, tensor.shape[1] if tensor.shape[:1] == (1,) else None}
        and not _NO_TOKENS.search(tensor.name)
    )
