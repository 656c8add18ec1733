"""What a plan needs to know of a model, read from its config and its safetensors headers alone."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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

#: model_type values the pipeline evaluates and exports; others are refused at validation
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

#: Families whose experts lie in files one by one, and in transformers' memory as one tensor.
MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"})
#: Families whose linear layers are Conv1D, with weights laid out [in, out].
CONV1D = frozenset({"gpt2"})
#: Families whose blocks run more than once, one after the other.
SHARED_BLOCKS = frozenset({"albert"})


#: What a classifier's outputs mean: one class of several, labels of which each holds or doesn't, or plain numbers.
Head = Literal["classes", "labels", "numbers"]
#: What a headless encoder's tensors are called, before the first dot.
_BODY = frozenset({"embeddings", "encoder", "pooler", "transformer", "layers", "final_norm", "embeddings_project"})


def class_of(named: str, model_type: str, tensors: "Collection[TensorInfo]") -> str:
    """The class that a checkpoint holds: the one that its config names, or that class without its head where an encoder's head has no tensor.

    Embedders that were trained from a masked language model often keep its name (all-mpnet-base-v2 does). A loader would give them a head
    of chance.
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
    """A model without its weights."""

    model_config = ConfigDict(frozen=True, protected_namespaces=(), defer_build=True)

    model_type: str
    architecture: str
    config: dict[str, Any] = Field(repr=False)
    tensors: tuple[TensorInfo, ...] = Field(repr=False)
    has_tokenizer: bool
    pooling: str = "mean"  #: how an embedder's token vectors become one; see core/recipes/pooling.py

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
        """Outputs of a classifier."""
        return len(self.config.get("id2label") or {}) or int(self.config.get("num_labels") or 2)

    @property
    def head(self) -> Head:
        """As transformers reads `problem_type`; a single output is a number, as a regression's or a reranker's is."""
        problem = self.config.get("problem_type")
        if problem == "regression" or self.classes == 1:
            return "numbers"
        return "labels" if problem == "multi_label_classification" else "classes"

    @property
    def one_text_a_batch(self) -> bool:
        """Whether the model can't read padded texts: a decoder's classifier finds a text's end by the padding token, and this has none."""
        return self.task == "classification" and self.model_type in DECODERS and padding_token(self.config) is None

    @property
    def tied_table(self) -> TensorInfo | None:
        """A language model's one matrix with a row a token: it is both looked up in and multiplied by. None: the head has its own, or there is none."""
        rows = self.config.get("vocab_size")
        tables = [tensor for tensor in self.tensors if len(tensor.shape) == 2 and tensor.shape[0] == rows]
        return tables[0] if self.task in {"causal-lm", "masked-lm"} and len(tables) == 1 else None

    @property
    def sees_images(self) -> bool:
        return self.model_type in VISION

    @property
    def positions(self) -> int | None:
        """The longest text the model takes, in tokens; None: it says none."""
        limit = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        if not isinstance(limit, int):
            return None
        # These count positions from their padding token on.
        return limit - 2 if self.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"} else limit


def padding_token(config: Mapping[str, Any]) -> int | None:
    """A model's own padding token. None: it has none; some configs write −1 for that."""
    found, words = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        return None
    return found if not isinstance(words, int) or found < words else None
