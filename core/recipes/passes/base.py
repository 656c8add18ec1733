"""What every pass is: options that say what they take, what they need, what they cost and what they leave behind. No torch here."""

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, blocks_cost, stream_cost
from nightpress.core.recipes.header import CONV1D, ModelHeader, TensorInfo
from nightpress.core.recipes.linears import Divisor, check_layout, invalid, is_linear_weight

ExportFormat = Literal["safetensors", "compressed-tensors", "onnx", "openvino", "gguf", "transformers.js"]
Need = Literal["nothing", "calibration", "labels", "training"]
Scope = Literal["stream", "blocks", "train"]
#: What a pass works on: the model's folder; the graph traced of it; the graph that one runtime's exporter writes; or nothing: it looks.
Stage = Literal["folder", "graph", "runtime", "measure"]
#: What the Hub calls a model beside the one it was made of (`base_model_relation`); None: its weights are the same.
Relation = Literal["quantized", "finetune"] | None
Patterns = Annotated[tuple[str, ...], Field(max_length=100)]
#: Families whose norms and linear layers can exchange factors; architectures.FOLDS says where.
FOLDABLE = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "gpt_neox",
        "opt",
        "starcoder2",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
    }
)
KEPT_MODULES = ("lm_head", "re:.*embed.*", "re:.*classifier.*", "re:.*pooler.*")


class PassOptions(BaseModel):
    """A pass as a recipe names it. What its methods say, they say from the model's header alone, before anything runs."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True, defer_build=True
    )

    stage: ClassVar[Stage] = "folder"
    #: Of a pass from another package: the module whose import registers the function (core/compress/passes/registry.py).
    implementation: ClassVar[str] = ""
    needs: ClassVar[Need] = "nothing"
    scope: ClassVar[Scope] = "stream"  #: the executor that runs it
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    exports: ClassVar[frozenset[ExportFormat]]  #: the formats that can carry its result
    last: ClassVar[bool] = False  #: no other pass can follow it
    quantizes: ClassVar[bool] = False  #: its result is codes and scales, which `compressed-tensors` carries
    relation: ClassVar[Relation] = "finetune"
    early_exits: ClassVar[bool] = False  #: the model it leaves has heads behind its blocks, which its graph needs too
    chooses_cache: ClassVar[bool] = (
        False  #: it says how keys and values are kept: decoding is timed without a cache too
    )

    @property
    def wants(self) -> Need:
        """What it needs with these options."""
        return self.needs

    @property
    def name(self) -> str:
        """What a recipe calls the pass."""
        return str(type(self).model_fields["pass_"].default)

    @property
    def rounding_bits(self) -> int | None:
        """Bits of the coarsest weight, where rounding is all it does; None where it may change the answers at will."""
        return None

    @property
    def cache_cuts_back(self) -> bool:
        """Whether the last tokens can be taken out again of the key/value cache that the model is left with."""
        return True

    def describe(self) -> str:
        """A few words for the plan."""
        raise NotImplementedError

    def check(self, header: ModelHeader) -> None:
        """Raise NightpressError(invalid_recipe), with the reason, where the pass can't take this model."""

    def check_beside(self, passes: Sequence["PassOptions"], header: ModelHeader | None) -> None:
        """Raise NightpressError(invalid_recipe) where the pass can't stand in one recipe with the others.

        passes: all of the recipe in order, this one included. `header` is None where no model was named.
        """

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        """What a person should know before it runs. `header` is None where no model was named."""
        return ()

    def warnings_behind(self, earlier: Sequence["PassOptions"]) -> Iterable[str]:
        """What a person should know of its place in the recipe. earlier: the passes before it."""
        return ()

    def data_refs(self) -> frozenset[str]:
        """The data sets that the pass itself names."""
        return frozenset()

    def wants_labels(self, header: ModelHeader | None) -> bool:
        """Whether each of those must have labels. `header` is None where no model was named."""
        return False

    def carriers(self, header: ModelHeader | None) -> frozenset[ExportFormat]:
        """The formats that can carry its result on this model; `exports` where that doesn't depend on it."""
        return self.exports

    def why_not(self, header: ModelHeader | None) -> str:
        """Why the other formats can't; empty where there is nothing to add."""
        return ""

    def leaves(self, header: ModelHeader) -> ModelHeader:
        """The header of the float model it leaves: later passes, estimates and exports see this one."""
        return header

    def settled(self, header: ModelHeader) -> Self:
        """The same pass, with what its options leave to the model decided."""
        return self

    def takes_linear(self, tensor: TensorInfo) -> bool:
        """Whether it changes this tensor as the weight of a linear layer in a block."""
        return False

    def stored_bytes(self, tensor: TensorInfo) -> int:
        """Bytes of a tensor of the model it leaves; `tensor.size` where the pass leaves it alone."""
        return tensor.size

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        """Memory and seconds of the pass itself, without evaluations and exports."""
        raise NotImplementedError


class OnLinears(PassOptions):
    """A pass over the weights of linear layers, one tensor or one block at a time."""

    turns: ClassVar[bool] = False  #: it knows weights laid out [in, out], and goes along their inputs all the same

    ignore: Patterns = Field(KEPT_MODULES, description="Modules left as they are: names, or `re:` patterns.")

    def divisor(self) -> Divisor | None:
        """What every layer's inputs must be divisible by."""
        return None

    def takes_linear(self, tensor: TensorInfo) -> bool:
        return is_linear_weight(tensor, self.ignore)

    def takes(self, tensor: TensorInfo) -> bool:
        """Whether it changes this tensor, wherever it stands."""
        return self.takes_linear(tensor)

    def check(self, header: ModelHeader) -> None:
        weights = [tensor for tensor in header.tensors if self.takes(tensor)]
        if not weights:
            raise invalid(
                f"`{self.name}` would change nothing: `ignore` leaves no linear weight of this model.",
                "Narrow `ignore`.",
            )
        if header.model_type in CONV1D and self.quantizes:
            raise invalid(
                f"`{self.name}` can't take a {header.model_type}: its linear layers are Conv1D with weights laid out [in, out], which no loader of the result reads.",
                "Use `sparsegpt` or `wanda`, or `magnitude` without a pattern, or another model.",
            )
        check_layout(self.name, weights, header, self.divisor(), turns=self.turns)

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        if header is not None:
            touched = sum(tensor.size for tensor in header.tensors if self.takes(tensor))
            if touched < header.size / 4:
                yield f"`{self.name}` touches only {100 * touched / header.size:.0f}% of the model's bytes; the rest is embeddings and norms."

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return stream_cost(header)


class Calibrated(OnLinears):
    """A pass that looks at calibration text, one block of the model at a time."""

    needs: ClassVar[Need] = "calibration"
    scope: ClassVar[Scope] = "blocks"
    turns: ClassVar[bool] = True

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return blocks_cost(header, calibration)
