"""The facts about a model that a plan needs, read from its config and its safetensors headers alone."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nightpress.core.recipes.brought import Brought
from nightpress.core.recipes.classes import Kind, Task, kind_of, reads_both_ways, reads_onwards
from nightpress.core.recipes.sentence import EmbedderUse

__all__ = ["Task"]

#: Families whose linear layers are Conv1D, with weights laid out [in, out]. The shapes alone don't tell.
CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
#: Families whose blocks share their weights: a stored block runs several times.
SHARED_BLOCKS = frozenset({"albert"})
#: Families that count positions from the padding token's id, so that the first two are unused.
_POSITIONS_AFTER_PADDING = frozenset(
    {
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "roberta-prelayernorm",
        "camembert",
        "data2vec-text",
        "longformer",
        "mpnet",
        "ibert",
        "xmod",
        "esm",
    }
)
#: Keys of config.json for the number of experts that a token passes.
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")
#: Keys of config.json for the longest text that a model takes.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",  # of a speech model: what its decoder reads
)


#: The meaning of a classifier's outputs: one of several classes, independent yes/no labels, or plain numbers.
Head = Literal["classes", "labels", "numbers"]
_EXPERT = re.compile(r"\.experts\.\d+\.")
#: First parts (before the first dot) of the tensors' names in an encoder without a head.
_BODY = frozenset({"embeddings", "encoder", "pooler", "transformer", "layers", "final_norm", "embeddings_project"})


def class_of(named: str, model_type: str, tensors: "Collection[TensorInfo]") -> str:
    """Return the class of a checkpoint: the class in its config, or that class without its head if an encoder's head has no tensors.

    Embedders that were trained from a masked language model often keep its class name, e.g. all-mpnet-base-v2. A loader would give them a
    head with random weights.
    """
    body, has_head, _ = named.partition("For")
    bare = (
        reads_both_ways(model_type)
        and len(tensors) > 0
        and all(tensor.name.partition(".")[0] in _BODY for tensor in tensors)
    )
    return f"{body}Model" if has_head and bare else named


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its safetensors header describes it.

    A model may have 100,000, so it is no pydantic model: making one would take ten times as long.
    """

    name: str
    dtype: str  #: safetensors name, e.g. "F32", "BF16"
    shape: tuple[int, ...]
    size: int  #: bytes


class ModelHeader(BaseModel):
    """A model's config and the descriptions of its tensors, without the weights."""

    model_config = ConfigDict(frozen=True, protected_namespaces=(), defer_build=True)

    model_type: str
    architecture: str
    config: dict[str, Any] = Field(repr=False)
    tensors: tuple[TensorInfo, ...] = Field(repr=False)
    has_tokenizer: bool
    pooling: str = "mean"  #: pooling mode of an embedder; see core/recipes/pooling.py
    use: EmbedderUse = (
        EmbedderUse()
    )  #: how sentence-transformers uses an embedder's vectors; see core/recipes/sentence.py
    #: the stored form of a source of codes, for which `tensors` are the floats that they stand for; None: it is stored as floats
    brought: Brought | None = None

    @property
    def parameters(self) -> int:
        total = 0
        for tensor in self.tensors:
            count = 1
            for dim in tensor.shape:
                count *= dim
            total += count
        return total

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def kind(self) -> Kind:
        """What the model's class answers and reads, and the class of transformers that loads it."""
        return kind_of(self.architecture, self.model_type)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the part that reads text: of a model that also sees or hears, the part of its own; else the whole config."""
        part = self.config.get("text_config")
        return {**self.config, **part} if isinstance(part, dict) else self.config

    @property
    def vision_config(self) -> Mapping[str, Any]:
        """The config of the part that sees; of a model that only sees, the whole config."""
        part = self.config.get("vision_config")
        return {**self.config, **part} if isinstance(part, dict) else self.config

    @property
    def has_experts(self) -> bool:
        """Whether the files hold a tensor for each expert's weight. transformers holds those of all experts in a single tensor."""
        return any(".experts." in tensor.name and _EXPERT.search(tensor.name) is not None for tensor in self.tensors)

    @property
    def routes(self) -> bool:
        """Whether the model is a mixture of experts: its files hold them apart, or fused."""
        return any(".experts." in tensor.name for tensor in self.tensors)

    @property
    def experts(self) -> int:
        """The number of experts of a mixture whose files hold them apart, as in `has_experts`; else 0."""
        return len({found[0] for tensor in self.tensors if (found := _EXPERT.search(tensor.name)) is not None})

    @property
    def expert_share(self) -> float:
        """The fraction of a text's tokens that reach an expert, if the router has no favourites."""
        chosen = next((self.text_config[key] for key in _CHOSEN if isinstance(self.text_config.get(key), int)), 1)
        return min(1.0, chosen / self.experts) if self.experts else 1.0

    @property
    def task(self) -> Task:
        return self.kind.task

    @property
    def is_decoder(self) -> bool:
        return self.task == "causal-lm"

    @property
    def classes(self) -> int:
        """Number of a classifier's outputs."""
        return len(self.config.get("id2label") or {}) or int(self.config.get("num_labels") or 2)

    @property
    def head(self) -> Head:
        """The meaning of a classifier's outputs, from `problem_type` as in transformers. A single output is a number (e.g. a reranker)."""
        problem = self.config.get("problem_type")
        if problem == "regression" or self.classes == 1:
            return "numbers"
        return "labels" if problem == "multi_label_classification" else "classes"

    @property
    def scores_pairs(self) -> bool:
        """Whether the model is a cross-encoder: it reads a query with a document and answers one number.

        Models that were trained for a number of a single text say `problem_type: regression`; decoders with one output are reward models.
        """
        return (
            self.task == "classification"
            and not self.sees_images
            and self.classes == 1
            and self.config.get("problem_type") != "regression"
            and not reads_onwards(self.model_type)
        )

    @property
    def reads_types(self) -> bool:
        """Whether the model tells a pair's texts apart by the type of each token."""
        return int(self.config.get("type_vocab_size") or 0) > 1

    @property
    def one_text_a_batch(self) -> bool:
        """Whether the model can't read padded texts: a decoder's classifier without a padding token can't find a text's end."""
        return self.task == "classification" and reads_onwards(self.model_type) and padding_token(self.config) is None

    @property
    def tied_table(self) -> TensorInfo | None:
        """A language model's token embeddings [vocabulary, width], if its output head uses the same matrix; else None."""
        rows = self.vocabulary
        tables = [tensor for tensor in self.tensors if len(tensor.shape) == 2 and tensor.shape[0] == rows]
        return tables[0] if self.task in {"causal-lm", "masked-lm"} and len(tables) == 1 else None

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that a language model knows; None: the config doesn't say."""
        words = self.text_config.get("vocab_size")
        return words if isinstance(words, int) else None

    @property
    def sees_images(self) -> bool:
        return self.kind.senses == "images"

    @property
    def pixels(self) -> tuple[int, int, int]:
        """The channels, height and width of an image that the model sees."""
        size = self.vision_config.get("image_size") or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return int(self.vision_config.get("num_channels") or 3), int(height), int(width)

    @property
    def hears(self) -> bool:
        return self.kind.senses == "sound"

    @property
    def features(self) -> tuple[int, int]:
        """The bands and frames of a log-mel spectrogram that the model hears: its encoder halves the frames."""
        return int(self.config.get("num_mel_bins") or 80), 2 * int(self.config.get("max_source_positions") or 1500)

    @property
    def positions(self) -> int | None:
        """The longest text that the model takes, in tokens; None: the config names no limit."""
        limit = next((self.text_config[key] for key in _POSITIONS if self.text_config.get(key)), None)
        if not isinstance(limit, int):
            return None
        return limit - 2 if self.model_type in _POSITIONS_AFTER_PADDING else limit


def padding_token(config: Mapping[str, Any]) -> int | None:
    """Return the id of the model's padding token. None: it has no valid id; some configs write −1."""
    found, words = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        return None
    return found if not isinstance(words, int) or found < words else None
