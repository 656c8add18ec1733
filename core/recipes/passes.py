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


Pass = Annotated[WeightOnly | Magnitude | DynamicInt8, Field(discriminator="pass_")]
PASS_TYPES: tuple[type[_Pass], ...] = (WeightOnly, Magnitude, DynamicInt8)
