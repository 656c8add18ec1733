"""The facts about a model that a plan needs, read from its config and its safetensors headers alone."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nightpress.core.recipes.brought import Brought

Task = Literal["causal-lm", "classification", "token-classification", "masked-lm", "embedding", "seq2seq", "other"]

_SUFFIXES: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForSequenceClassification", "classification"),
    ("ForImageClassification", "classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForMaskedLM", "masked-lm"),
    ("ForConditionalGeneration", "seq2seq"),
    ("Model", "embedding"),
)

#: Values of `model_type` that can be evaluated and exported here; all others are refused at validation.
ENCODERS = frozenset(
    {
        "bert",
        "roberta",
        "distilbert",
        "mpnet",
        "xlm-roberta",
        "electra",
        "albert",
        "camembert",
        "deberta-v2",
        "modernbert",
    }
)
DECODERS = frozenset(
    {
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "gpt2",
        "gpt_neox",
        "gpt_bigcode",
        "opt",
        "falcon",
        "starcoder2",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
    }
)

ENCODER_DECODERS = frozenset({"t5"})
VISION = frozenset({"vit"})

#: Mixtures of experts: files hold a tensor for each expert's weight, and transformers holds those of all experts in a single tensor.
MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"})
#: Families whose linear layers are Conv1D, with weights laid out [in, out].
CONV1D = frozenset({"gpt2"})
#: Families whose blocks share their weights: a stored block runs several times.
SHARED_BLOCKS = frozenset({"albert"})


#: The meaning of a classifier's outputs: one of several classes, independent yes/no labels, or plain numbers.
Head = Literal["classes", "labels", "numbers"]
#: First parts (before the first dot) of the tensors' names in an encoder without a head.
_BODY = frozenset({"embeddings", "encoder", "pooler", "transformer", "layers", "final_norm", "embeddings_project"})


def class_of(named: str, model_type: str, tensors: "Collection[TensorInfo]") -> str:
    """Return the class of a checkpoint: the class in its config, or that class without its head if an encoder's head has no tensors.

    Embedders that were trained from a masked language model often keep its class name, e.g. all-mpnet-base-v2. A loader would give them a
    head with random weights.
    """
    body, has_head, _ = named.partition("For")
    bare = (
        model_type in ENCODERS
        and len(tensors) > 0
        and all(tensor.name.partition(".")[0] in _BODY for tensor in tensors)
    )
    return f"{body}Model" if has_head and bare else named


class TensorInfo(BaseModel):
    """One tensor as its safetensors header describes it."""

    model_config = ConfigDict(frozen=True, defer_build=True)

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
    def task(self) -> Task:
        return next((task for suffix, task in _SUFFIXES if self.architecture.endswith(suffix)), "other")

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
    def one_text_a_batch(self) -> bool:
        """Whether the model can't read padded texts: a decoder's classifier without a padding token can't find a text's end."""
        return self.task == "classification" and self.model_type in DECODERS and padding_token(self.config) is None

    @property
    def tied_table(self) -> TensorInfo | None:
        """A language model's token embeddings [vocabulary, width], if its output head uses the same matrix; else None."""
        rows = self.config.get("vocab_size")
        tables = [tensor for tensor in self.tensors if len(tensor.shape) == 2 and tensor.shape[0] == rows]
        return tables[0] if self.task in {"causal-lm", "masked-lm"} and len(tables) == 1 else None

    @property
    def sees_images(self) -> bool:
        return self.model_type in VISION

    @property
    def positions(self) -> int | None:
        """The longest text that the model takes, in tokens; None: the config names no limit."""
        limit = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        if not isinstance(limit, int):
            return None
        # These families count positions from the padding token's id, so the first two are unused.
        return limit - 2 if self.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"} else limit


def padding_token(config: Mapping[str, Any]) -> int | None:
    """Return the id of the model's padding token. None: it has no valid id; some configs write −1."""
    found, words = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        return None
    return found if not isinstance(words, int) or found < words else None
