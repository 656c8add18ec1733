"""How sentence-transformers uses an embedder's pooled vectors: prompts, normalization, similarity and truncation.

Read from `config_sentence_transformers.json` and `modules.json`. The evaluation of similarity and retrieval follows it, so that a figure is that
of the model as its users run it.
"""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from nightpress.core.recipes.jsonfile import malformed
from nightpress.core.recipes.pooling import MODULES_FILE, Read

CONFIG_FILE = "config_sentence_transformers.json"
SimilarityFunction = Literal["cosine", "dot", "euclidean", "manhattan"]
#: The prompts that sentence-transformers takes for a document, the first that there is.
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_MOST_PROMPT = 10_000  #: characters of a prompt


class EmbedderUse(BaseModel):
    """What sentence-transformers does with an embedder's texts before the model, and with its vectors after the pooling."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    similarity: SimilarityFunction = "cosine"
    normalized: bool = False  #: `modules.json` ends with a module that gives each vector the length 1
    prompts: dict[str, str] = Field(default_factory=dict)  #: name → what is put before a text
    default_prompt: str = ""  #: name of the prompt of texts that have none of their own; empty: they get none
    truncate_dim: int | None = None  #: numbers of a vector that are kept, from its start; None: all

    @property
    def text_prompt(self) -> str:
        """What is put before a text of no kind."""
        return self.prompts.get(self.default_prompt, "")

    @property
    def query_prompt(self) -> str:
        """What `encode_query` puts before a text."""
        return self.prompts.get("query") or self.text_prompt

    @property
    def document_prompt(self) -> str:
        """What `encode_document` puts before a text."""
        return next((self.prompts[name] for name in _DOCUMENT_PROMPTS if self.prompts.get(name)), self.text_prompt)


def read_use(read: Read) -> EmbedderUse:
    """Return how sentence-transformers uses the vectors; the defaults if the folder says nothing. Raises NightpressError(malformed_model)."""
    config = read(CONFIG_FILE)
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise malformed(CONFIG_FILE, "it is not a JSON object")
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str) and len(text) <= _MOST_PROMPT for text in prompts.values()
    ):
        raise malformed(CONFIG_FILE, f"its `prompts` are no names with texts of at most {_MOST_PROMPT} characters")
    default = config.get("default_prompt_name") or ""
    if default and default not in prompts:
        raise malformed(CONFIG_FILE, "its `default_prompt_name` names none of its `prompts`")
    similarity = config.get("similarity_fn_name") or "cosine"
    if similarity not in get_args(SimilarityFunction):
        raise malformed(CONFIG_FILE, f"its `similarity_fn_name` is none of {', '.join(get_args(SimilarityFunction))}")
    kept = config.get("truncate_dim")
    if kept is not None and (isinstance(kept, bool) or not isinstance(kept, int) or kept < 1):
        raise malformed(CONFIG_FILE, "its `truncate_dim` is no number of dimensions")
    return EmbedderUse(
        similarity=similarity, normalized=_normalizes(read), prompts=prompts, default_prompt=default, truncate_dim=kept
    )


def _normalizes(read: Read) -> bool:
    modules: Any = read(MODULES_FILE)
    named = modules if isinstance(modules, list) else []
    return any(isinstance(each, dict) and str(each.get("type", "")).endswith(".Normalize") for each in named)
