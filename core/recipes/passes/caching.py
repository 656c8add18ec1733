"""The key/value cache of a decoder while it generates."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat, PassOptions, Relation, Scope

CacheMode = Literal["none", "dynamic", "static", "sliding", "quantized"]

#: Families with rotary positions on the two halves of a key: a cached key can be rotated to a new position.
_ROTATED = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "gpt_neox", "starcoder2", "mixtral"}
)
#: Rotations that change with the length of the text.
_CHANGING_ROPE = frozenset({"dynamic", "longrope"})
_FIELDS: dict[str, CacheMode] = {
    "length": "static",
    "window": "sliding",
    "sinks": "sliding",
    "bits": "quantized",
    "residual": "quantized",
    "prefix_bytes": "dynamic",
}
#: Tokens that the model runs in the pass's own checks, without a cache.
_CHECKED_TOKENS = 4000


class GenerationCache(PassOptions):
    """Write the settings of the key/value cache into generation_config.json, and compare decoding with the cache to decoding without it.

    `none` keeps nothing: each token takes a pass over the whole text. `dynamic` grows with the text. `static` allocates its whole length at
    the start, as compiled decoding needs it. `sliding` keeps the first tokens and the newest tokens (StreamingLLM, arXiv 2309.17453), so
    that its memory does not grow with the text. `quantized` rounds all but the newest tokens: keys by channel, values by token (KIVI, arXiv
    2402.02750). The weights are unchanged; a pass that quantizes them may follow. For caches that transformers lacks,
    `custom_generate/generate.py` is written beside the model.
    """

    scope: ClassVar[Scope] = "train"
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors", "compressed-tensors"})
    relation: ClassVar[Relation] = None
    chooses_cache: ClassVar[bool] = True

    pass_: Literal["generation-cache"] = Field("generation-cache", alias="pass")
    mode: CacheMode = "dynamic"
    length: int | None = Field(
        None, ge=16, le=1_048_576, description="`static`: number of tokens that the cache has room for."
    )
    window: int | None = Field(None, ge=1, le=1_048_576, description="`sliding`: newest tokens that are kept.")
    sinks: int = Field(4, ge=0, le=1024, description="`sliding`: first tokens that are kept as well.")
    bits: Literal[2, 4, 8] = Field(4, description="`quantized`: bits of each number in keys and values.")
    residual: int = Field(
        64, ge=0, le=65_536, description="`quantized`: at least so many of the newest tokens are not rounded."
    )
    prefix_bytes: int | None = Field(
        None,
        ge=1,
        le=1 << 40,
        description="`dynamic`: memory for keys and values of earlier texts, which are kept for texts with the same beginning. The least frequently used are dropped first.",
    )

    @model_validator(mode="after")
    def _options_of_the_mode(self) -> Self:
        for name, mode in _FIELDS.items():
            # A normalised recipe contains every field, so a field at its default does not count as set.
            if mode != self.mode and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` is for `mode: {mode}`, and the mode is {self.mode!r}")
        if self.mode == "static" and self.length is None:
            raise ValueError("`mode: static` needs a `length`: it takes all its memory at the start")
        if self.mode == "sliding" and self.window is None:
            raise ValueError("`mode: sliding` needs a `window`: how many of the newest tokens are kept")
        if self.window is not None and self.window <= self.sinks:
            raise ValueError(
                f"a `window` of {self.window} is not more than the {self.sinks} `sinks`: hardly any of the text would be seen"
            )
        return self

    def describe(self) -> str:
        match self.mode:
            case "none":
                return "nothing is kept between tokens"
            case "static":
                return f"room for {self.length} tokens from the start"
            case "sliding":
                return f"the first {self.sinks} and the last {self.window} tokens"
            case "quantized":
                return f"{self.bits} bits, the newest {self.residual} tokens in float"
            case _:
                reuse = "" if self.prefix_bytes is None else f", {self.prefix_bytes / 1e6:,.0f} MB of earlier texts"
                return f"grows with the text{reuse}"

    @property
    def cache_cuts_back(self) -> bool:
        return self.mode in {"none", "dynamic"}

    @property
    def exact_to(self) -> float:
        """Length of text in tokens up to which the cache gives the same result as no cache."""
        match self.mode:
            case "sliding":
                return self.sinks + (self.window or 0)
            case "quantized":
                return self.residual
            case _:
                return math.inf

    def settings(self) -> dict[str, Any]:
        """Return the settings for generation_config.json. transformers ignores `cache_config`; custom_generate/generate.py reads it."""
        match self.mode:
            case "none":
                return {"use_cache": False}
            case "static":
                return {"use_cache": True, "cache_implementation": "static", "max_cache_len": self.length}
            case "sliding":
                own: dict[str, Any] = {"mode": "sliding", "sinks": self.sinks, "window": self.window}
            case "quantized":
                own = {"mode": "quantized", "bits": self.bits, "residual": self.residual}
            case _ if self.prefix_bytes is not None:
                own = {"mode": "dynamic", "prefix_bytes": self.prefix_bytes}
            case _:
                return {"use_cache": True}
        return {"use_cache": True, "cache_config": own}

    def check(self, header: ModelHeader) -> None:
        if not header.is_decoder:
            raise invalid(
                f"`generation-cache` can't take a model for {header.task}: it writes no text token after token.",
                "It takes causal language models.",
            )
        limit = header.positions
        for name, tokens in (("length", self.length), ("window", self.window)):
            if tokens is not None and limit is not None and tokens > limit:
                raise invalid(
                    f"`generation-cache`: a `{name}` of {tokens} tokens is more than the model's {limit} positions.",
                    f"Use {limit} at most.",
                )
        if self.mode not in {"sliding", "quantized"}:
            return
        if _own_window(header):
            raise invalid(
                f"`generation-cache`: layers of this {header.model_type} have a sliding window of their own, which a {self.mode} cache would replace.",
                "Use `mode: dynamic` or `static`, which keep it.",
            )
        if self.mode == "sliding" and header.model_type not in _ROTATED:
            raise invalid(
                f"`generation-cache`: a {header.model_type} has no rotary positions, so tokens that are kept can't move up behind each other.",
                f"Use `mode: quantized`; `sliding` takes {', '.join(sorted(_ROTATED))}.",
            )
        if self.mode == "sliding" and _rope_kind(header) in _CHANGING_ROPE:
            raise invalid(
                f"`generation-cache`: the model's rotations change with the text's length ({_rope_kind(header)}), so kept keys can't be moved.",
                "Use `mode: quantized`.",
            )

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        if self.mode == "none":
            yield "`generation-cache`: without a cache each token costs a pass over the whole text."
        if self.mode == "sliding":
            yield f"`generation-cache`: beyond {self.exact_to:.0f} tokens the model no longer sees what left its window."
        if "cache_config" in self.settings():
            yield "`generation-cache`: transformers runs the folder's own custom_generate/generate.py if told to with `trust_remote_code=True`; other consumers don't know it."

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        whole = 4 * header.parameters
        return Cost(whole, 0.0, _CHECKED_TOKENS * header.parameters, gpu_bytes=whole)


def _own_window(header: ModelHeader) -> bool:
    config = header.config
    if config.get("use_sliding_window") is False:
        return False
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return any(kind != "full_attention" for kind in kinds)
    return isinstance(config.get("sliding_window"), int)


def _rope_kind(header: ModelHeader) -> str:
    for key in ("rope_parameters", "rope_scaling"):
        rope = header.config.get(key)
        if isinstance(rope, dict):
            return str(rope.get("rope_type") or rope.get("type") or "default")
    return "default"
