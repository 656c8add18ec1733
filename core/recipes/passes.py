"""The passes a recipe may name. Each model says what it takes, what it needs and what it can be followed by."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ExportFormat = Literal["safetensors", "compressed-tensors", "onnx", "openvino"]
Need = Literal["nothing", "calibration", "labels", "training"]
Scope = Literal["stream", "blocks", "train", "graph"]


class _Pass(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    needs: ClassVar[Need] = "nothing"
    scope: ClassVar[Scope]
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    exports: ClassVar[frozenset[ExportFormat]]  #: the formats that can carry its result
    last: ClassVar[bool] = False  #: no other pass can follow it


_Patterns = Annotated[tuple[str, ...], Field(max_length=100)]


class WeightOnly(_Pass):
    """Round linear weights to the nearest step of an integer grid; activations stay in float.

    int8: a scale a channel. int4: a scale a group of `group_size` inputs. Written as compressed-tensors `pack-quantized`.
    """

    needs: ClassVar[Need] = "nothing"
    scope: ClassVar[Scope] = "stream"
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors"})
    last: ClassVar[bool] = True

    pass_: Literal["weight-only"] = Field("weight-only", alias="pass")
    bits: Literal[4, 8] = 8
    group_size: int | None = Field(
        None, ge=16, le=1024, description="Inputs that share a scale; null: one scale a row. Default 128 at 4 bits."
    )
    symmetric: bool = True
    ignore: _Patterns = Field(
        ("lm_head", "re:.*embed.*", "re:.*classifier.*", "re:.*pooler.*"),
        description="Modules left as they are: names, or `re:` patterns.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_group(cls, raw: object) -> object:
        if isinstance(raw, dict) and raw.get("bits") == 4 and "group_size" not in raw:
            return {**raw, "group_size": 128}
        return raw


class Magnitude(_Pass):
    """Set the weights of smallest magnitude (L1) to zero.

    `layer` takes the same share of every layer, `global` compares all layers. `pattern: "2:4"` keeps the two largest of every
    four neighbours in a row. A mask alone makes a dense model neither smaller nor faster: the report says what it saved.
    """

    scope: ClassVar[Scope] = "stream"
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors", "compressed-tensors", "onnx", "openvino"})

    pass_: Literal["magnitude"] = Field("magnitude", alias="pass")
    sparsity: float = Field(
        0.5, gt=0, lt=1, description="Share of weights set to zero; with a pattern N:M it is 1 − N/M."
    )
    across: Literal["layer", "global"] = "layer"
    pattern: str = Field("unstructured", pattern=r"^(unstructured|[1-9]\d?:[1-9]\d?)$")
    ignore: _Patterns = ("lm_head", "re:.*embed.*", "re:.*classifier.*", "re:.*pooler.*")

    @model_validator(mode="after")
    def _pattern_fits(self) -> "Magnitude":
        if self.pattern != "unstructured":
            kept, group = (int(part) for part in self.pattern.split(":"))
            if kept >= group:
                raise ValueError(f"pattern {self.pattern}: the first number must be smaller than the second")
            if self.across == "global":
                raise ValueError("a pattern N:M is decided within each row; leave `across` at `layer`")
            if "sparsity" in self.model_fields_set and abs(self.sparsity - (1 - kept / group)) > 1e-9:
                raise ValueError(f"pattern {self.pattern} gives sparsity {1 - kept / group:g}; leave `sparsity` out")
            object.__setattr__(self, "sparsity", 1 - kept / group)
        return self


_Pattern = Annotated[str, Field(pattern=r"^(unstructured|[1-9]\d?:[1-9]\d?)$")]
_KEPT_MODULES = ("lm_head", "re:.*embed.*", "re:.*classifier.*", "re:.*pooler.*")


class _Calibrated(_Pass):
    """A pass that looks at calibration text, one block of the model at a time."""

    needs: ClassVar[Need] = "calibration"
    scope: ClassVar[Scope] = "blocks"

    ignore: _Patterns = _KEPT_MODULES


class Gptq(_Calibrated):
    """Round linear weights one input after another, the inputs still to come making up for what each loses (arXiv 2210.17323).

    With `sparsity` or a `pattern`, weights are pruned on the way by the same rule (SparseGPT). Written as `pack-quantized`.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors"})
    last: ClassVar[bool] = True

    pass_: Literal["gptq"] = Field("gptq", alias="pass")
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(128, ge=16, le=1024, description="Inputs that share a scale; null: one scale a row.")
    symmetric: bool = True
    order: Literal["activation", "natural"] = Field(
        "activation",
        description="`activation`: the inputs with the most power first. The result loads and runs just the same.",
    )
    ranges: Literal["extremes", "least-error"] = Field(
        "least-error", description="A scale from its weights' extremes, or where their rounding costs the output least."
    )
    damping: float = Field(0.01, gt=0, le=1, description="Of the mean power of the inputs, added to each one's.")
    sparsity: float | None = Field(None, gt=0, lt=1, description="Share of weights set to zero as well.")
    pattern: _Pattern = "unstructured"

    @model_validator(mode="before")
    @classmethod
    def _pattern_gives_sparsity(cls, raw: object) -> object:
        return _with_sparsity(raw)

    @model_validator(mode="after")
    def _pattern_in_order(self) -> "Gptq":
        if self.pattern != "unstructured" and self.order == "activation":
            raise ValueError("a pattern N:M needs `order: natural`")
        return self


class Awq(_Calibrated):
    """Scale columns up where their inputs are strong, before rounding to nearest; the norms before them make up for it (arXiv 2306.00978).

    Takes decoders whose norms and linear layers can exchange factors. Written as `pack-quantized`.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"compressed-tensors"})
    last: ClassVar[bool] = True
    model_types: ClassVar[frozenset[str]] = frozenset(
        {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "gpt_neox", "opt"}
    )

    pass_: Literal["awq"] = Field("awq", alias="pass")
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(128, ge=16, le=1024, description="Inputs that share a scale; null: one scale a row.")
    symmetric: bool = False
    ranges: Literal["extremes", "least-error"] = Field(
        "least-error", description="A scale from its weights' extremes, or where their rounding costs the output least."
    )


class SparseGpt(_Calibrated):
    """Set the weights to zero that the output misses least, the others making up for them (arXiv 2301.00774).

    A mask alone makes a dense model neither smaller nor faster: the report says what it saved.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors", "compressed-tensors", "onnx", "openvino"})

    pass_: Literal["sparsegpt"] = Field("sparsegpt", alias="pass")
    sparsity: float = Field(
        0.5, gt=0, lt=1, description="Share of weights set to zero; with a pattern N:M it is 1 − N/M."
    )
    pattern: _Pattern = "unstructured"
    damping: float = Field(0.01, gt=0, le=1, description="Of the mean power of the inputs, added to each one's.")

    @model_validator(mode="before")
    @classmethod
    def _pattern_gives_sparsity(cls, raw: object) -> object:
        return _with_sparsity(raw)


class Wanda(_Calibrated):
    """Set the weights of smallest magnitude times input norm to zero, row by row (arXiv 2306.11695). The others stay as they are.

    A mask alone makes a dense model neither smaller nor faster: the report says what it saved.
    """

    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors", "compressed-tensors", "onnx", "openvino"})

    pass_: Literal["wanda"] = Field("wanda", alias="pass")
    sparsity: float = Field(
        0.5, gt=0, lt=1, description="Share of weights set to zero; with a pattern N:M it is 1 − N/M."
    )
    pattern: _Pattern = "unstructured"

    @model_validator(mode="before")
    @classmethod
    def _pattern_gives_sparsity(cls, raw: object) -> object:
        return _with_sparsity(raw)


def _with_sparsity(raw: object) -> object:
    """A pattern N:M says the sparsity itself. Raises ValueError where the two don't agree."""
    if not isinstance(raw, dict) or ":" not in str(raw.get("pattern", "")):
        return raw
    kept, _, of = str(raw["pattern"]).partition(":")
    if not (kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)):
        raise ValueError(f"pattern {raw['pattern']}: the first number must be smaller than the second")
    given = 1 - int(kept) / int(of)
    if raw.get("sparsity") is not None and raw["sparsity"] != given:
        raise ValueError(f"pattern {raw['pattern']} gives sparsity {given:g}; leave `sparsity` out")
    return {**raw, "sparsity": given}


class DynamicInt8(_Pass):
    """Int8 weights, and activations rounded to int8 as they come, in ONNX Runtime or OpenVINO.

    The fastest form of an encoder on a CPU. Needs no data.
    """

    scope: ClassVar[Scope] = "graph"
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu"})
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"onnx", "openvino"})
    last: ClassVar[bool] = True

    pass_: Literal["dynamic-int8"] = Field("dynamic-int8", alias="pass")
    per_channel: bool = True
    ignore: _Patterns = Field((), description="Graph nodes left in float: names, or `re:` patterns.")


Pass = Annotated[WeightOnly | Magnitude | Gptq | Awq | SparseGpt | Wanda | DynamicInt8, Field(discriminator="pass_")]
PASS_TYPES: tuple[type[_Pass], ...] = (WeightOnly, Magnitude, Gptq, Awq, SparseGpt, Wanda, DynamicInt8)
