"""Base classes of all passes' options: which models a pass takes, what it needs, what it costs and what it leaves. No torch here."""

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, blocks_cost, stream_cost
from nightpress.core.recipes.gates import Gate
from nightpress.core.recipes.header import CONV1D, ModelHeader, TensorInfo
from nightpress.core.recipes.linears import Divisor, check_layout, invalid, is_linear_weight

ExportFormat = Literal["safetensors", "compressed-tensors", "onnx", "openvino", "gguf", "mlx", "transformers.js"]
GRAPHS: frozenset[ExportFormat] = frozenset({"onnx", "openvino"})  #: the formats that carry a pass's result in a graph
Need = Literal["nothing", "calibration", "labels", "training"]
Scope = Literal["stream", "blocks", "train"]
#: What a pass changes: how the source is read; the model's folder; the graph traced from it; the graph that a runtime's exporter writes; or
#: nothing: it measures.
Stage = Literal["source", "folder", "graph", "runtime", "measure"]
#: The Hub's word for how a model relates to its base model (`base_model_relation`); None: the weights are unchanged.
Relation = Literal["quantized", "finetune"] | None
Patterns = Annotated[tuple[str, ...], Field(max_length=100)]
KEPT_MODULES = ("lm_head", "re:.*embed.*", "re:.*classifier.*", "re:.*pooler.*")


class PassOptions(BaseModel):
    """The options of a pass in a recipe. All methods use only the model's header, so that a plan can be made before anything runs."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True, defer_build=True
    )

    stage: ClassVar[Stage] = "folder"
    #: Only for a pass of another package: the module whose import registers the function (core/compress/passes/registry.py).
    implementation: ClassVar[str] = ""
    needs: ClassVar[Need] = "nothing"
    scope: ClassVar[Scope] = "stream"  #: the executor that runs the pass
    runs_on: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    exports: ClassVar[frozenset[ExportFormat]]  #: the formats that can carry the result
    last: ClassVar[bool] = False  #: whether no other pass can follow
    reads_codes: ClassVar[bool] = False  #: whether it follows a pass that leaves codes, which no other pass reads
    quantizes: ClassVar[bool] = False  #: whether the result is codes and scales, which `compressed-tensors` carries
    relation: ClassVar[Relation] = "finetune"
    #: Script in core/compress/runners that loads the result; empty: that of the export's format.
    runner: ClassVar[str] = ""
    spreads: ClassVar[bool] = (
        False  #: whether several processes, one for each GPU, share out its work on calibration text or in training
    )
    renumbers: ClassVar[bool] = False  #: whether tokens get other ids
    early_exits: ClassVar[bool] = False  #: whether the model gets heads behind its blocks, which its graph needs too
    chooses_cache: ClassVar[bool] = (
        False  #: whether it sets the key/value cache: decoding is then also timed without a cache
    )

    @property
    def wants(self) -> Need:
        """What the pass needs with these options."""
        return self.needs

    @property
    def shared_out(self) -> bool:
        """Whether the processes of a job on several GPUs share out its work, with these options; else it runs in one of them."""
        return self.spreads and self.wants in {"calibration", "training"}

    @property
    def name(self) -> str:
        """The pass's name in a recipe."""
        return str(type(self).model_fields["pass_"].default)

    @property
    def rounding_bits(self) -> int | None:
        """Bits of the coarsest weight if the pass only rounds weights; None if it changes the model's outputs in other ways."""
        return None

    @property
    def family(self) -> tuple[float, ...]:
        """The speeds of the models that the pass makes, if it makes several; each export is made for each. Empty: it makes one model."""
        return ()

    @property
    def cache_cuts_back(self) -> bool:
        """Whether the last tokens can be removed from the key/value cache that the resulting model uses."""
        return True

    @property
    def gate_within(self) -> Gate | None:
        """The gate for which the pass finds the smallest result itself; None: its options say everything."""
        return None

    def tries(self, header: ModelHeader) -> int:
        """Return how many results the pass measures at most, to find the smallest that keeps its gate."""
        return 0

    def describe(self) -> str:
        """Return a short description for the plan."""
        raise NotImplementedError

    def check(self, header: ModelHeader) -> None:
        """Raise NightpressError(invalid_recipe) with the reason if the pass can't take this model."""

    def check_beside(self, passes: Sequence["PassOptions"], header: ModelHeader | None) -> None:
        """Raise NightpressError(invalid_recipe) if the pass and the other passes can't be in the same recipe.

        passes: all passes of the recipe in order, including this pass. header: None if no model was named.
        """

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        """Return warnings for the plan. header: None if no model was named."""
        return ()

    def warnings_behind(self, earlier: Sequence["PassOptions"]) -> Iterable[str]:
        """Return warnings about the pass's place in the recipe. earlier: the passes before this pass."""
        return ()

    def data_refs(self) -> frozenset[str]:
        """Return the data sets that the pass's own options name."""
        return frozenset()

    def wants_labels(self, header: ModelHeader | None) -> bool:
        """Return whether each of these data sets must have labels. header: None if no model was named."""
        return False

    def carriers(self, header: ModelHeader | None) -> frozenset[ExportFormat]:
        """Return the formats that can carry the result for this model: `exports`, unless they depend on model or options."""
        return self.exports

    def why_not(self, header: ModelHeader | None) -> str:
        """Return why the other formats can't carry the result; empty: no further reason."""
        return ""

    def leaves(self, header: ModelHeader) -> ModelHeader:
        """Return the header of the float model after the pass. Later passes, estimates and exports use it."""
        return header

    def settled(self, header: ModelHeader) -> Self:
        """Return the same pass with options that depend on the model replaced by their values for this model."""
        return self

    def takes_linear(self, tensor: TensorInfo) -> bool:
        """Return whether the pass changes this tensor as the weight of a linear layer in a block."""
        return False

    def stored_bytes(self, tensor: TensorInfo) -> int:
        """Return the bytes of a tensor after the pass; `tensor.size` if the pass does not change it."""
        return tensor.size

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        """Return memory and seconds of the pass itself, without evaluations and exports."""
        raise NotImplementedError


class OnLinears(PassOptions):
    """A pass over the weights of linear layers, one tensor or one block at a time."""

    turns: ClassVar[bool] = (
        False  #: whether it transposes weights stored as [in, out], so that groups run along their inputs, too
    )

    ignore: Patterns = Field(KEPT_MODULES, description="Modules that are not changed: names, or `re:` patterns.")

    def divisor(self) -> Divisor | None:
        """Return the number that must divide every layer's number of inputs; None: there is no such number."""
        return None

    def takes_linear(self, tensor: TensorInfo) -> bool:
        return is_linear_weight(tensor, self.ignore)

    def takes(self, tensor: TensorInfo) -> bool:
        """Return whether the pass changes this tensor, inside or outside the blocks."""
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
    """A pass that uses calibration text, one block of the model at a time."""

    needs: ClassVar[Need] = "calibration"
    scope: ClassVar[Scope] = "blocks"
    turns: ClassVar[bool] = True

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return blocks_cost(header, calibration, in_parts=True)
