"""Structured pruning: what its passes have in common, and the options of those that remove feed-forward channels or attention heads."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nightpress.core.recipes.anatomy import OWN_SHAPES, Anatomy, Inner, anatomy_of
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, blocks_cost
from nightpress.core.recipes.header import SHARED_BLOCKS, ModelHeader, TensorInfo
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import GRAPHS, ExportFormat, Need, PassOptions, Scope
from nightpress.core.recipes.passes.within import Searching

_ANY: frozenset[ExportFormat] = frozenset({"safetensors", "compressed-tensors", "onnx", "openvino"})

Importance = Literal["l1", "l2", "activation", "taylor"]
_MOST_SHARE = 0.99  #: with `within` and no `share`


class Shrinking(Searching):
    """A pass that makes a model's matrices fewer or smaller."""

    spreads: ClassVar[bool] = True
    needs: ClassVar[Need] = "calibration"
    scope: ClassVar[Scope] = "blocks"
    exports: ClassVar[frozenset[ExportFormat]] = _ANY

    def anatomy(self, header: ModelHeader) -> Anatomy:
        if header.model_type in SHARED_BLOCKS:
            raise invalid(
                f"`{self.name}` can't take a {header.model_type}: its blocks share their weights.",
                "Distil it into a smaller student.",
            )
        return anatomy_of(header, self.name)

    @property
    def by_gradient(self) -> bool:
        """Whether the pass runs a backward pass of the whole model, and so holds all of it in memory."""
        raise NotImplementedError

    def choices(self, header: ModelHeader) -> tuple[Self, ...]:
        """With `within`: the same pass with each extent that the search may choose, the smallest result first."""
        raise NotImplementedError

    @property
    def extent(self) -> str:
        """How much is removed, e.g. `37.5% of the channels removed`."""
        raise NotImplementedError

    def most_results(self, header: ModelHeader) -> int:
        return 1 + len(self.choices(header))

    def check_beside(self, passes: Sequence[PassOptions], header: ModelHeader | None) -> None:
        """With `within`, the passes that follow must take every result that the search may choose."""
        if self.within is None or header is None:
            return
        at, seen = passes.index(self), header
        for earlier in passes[:at]:
            seen = earlier.leaves(seen)
        for choice in self.choices(seen):
            left = choice.leaves(seen)
            for later in passes[at + 1 :]:
                later.check(left)
                left = later.leaves(left)

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return self._once(header, calibration).times(max(1, self.tries(header)))

    def _once(self, header: ModelHeader, calibration: Calibration) -> Cost:
        found = blocks_cost(header, calibration)
        if not self.by_gradient:
            return found
        # A backward pass costs two forward passes. It keeps about twenty activations per block, for one text at a time.
        hidden = max((min(tensor.shape) for tensor in header.tensors if len(tensor.shape) == 2), default=0)
        kept = 20 * 4 * calibration.length * hidden * self.anatomy(header).layers
        whole = 4 * header.parameters + kept
        return found._replace(
            memory_bytes=max(found.memory_bytes, whole),
            seconds=2 * found.seconds,
            work=2 * found.work,
            gpu_bytes=max(found.gpu_bytes, whole),
            gpu_bytes_on=None,
        )


class Narrowing(Shrinking):
    """A pass that reduces a width inside each block."""

    share: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="Share of the units to remove; each layer's number is rounded. With `within`: the largest share to try, 0.99 by default.",
    )
    importance: Importance = Field(
        "activation",
        description="Which units are removed: those with the smallest weights (`l1`, `l2`), those without which the layer's output changes least on the "
        "calibration text (`activation`), or those without which the model's loss changes least (`taylor`, arXiv 2305.11627).",
    )
    across: Literal["layer", "global"] = Field(
        "layer",
        description="Remove the same share of each layer, or the share of all layers together. In the second case layers get different widths.",
    )
    compensate: bool = Field(
        True,
        description="Fit the remaining weights to the layer's former outputs on the calibration text, by least squares.",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="Added to the diagonal of the Gram matrix in that fit, as a share of its mean."
    )

    @model_validator(mode="before")
    @classmethod
    def _any_share(cls, raw: object) -> object:
        return with_most(raw, "share", _MOST_SHARE)

    @property
    def by_gradient(self) -> bool:
        return self.importance == "taylor"

    def describe(self) -> str:
        if self.within is not None:
            return f"up to {self.share:.0%} fewer that keep {self.within}, by {self.importance}, {'the same' if self.across == 'layer' else 'unlike'} in every layer"
        return f"{self.share:.0%} fewer, by {self.importance}, {'the same' if self.across == 'layer' else 'unlike'} in every layer"

    def inner(self, anatomy: Anatomy) -> Inner:
        """Return the width that becomes smaller."""
        raise NotImplementedError

    def counts(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Return the number of units of each block: channels, or groups of heads."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        """The number of units that a layer keeps is a multiple of this."""
        return 1

    def kept(self, count: int) -> int:
        """Return how many of a layer's `count` units stay if every layer loses the same share."""
        return round(count * (1 - self.share) / self.step) * self.step

    @property
    def extent(self) -> str:
        return f"{self.share:.1%} of the {self.name} removed"

    def choices(self, header: ModelHeader) -> tuple[Self, ...]:
        counts = self.counts(self.anatomy(header))
        units = max(counts) // self.step
        found = []
        for gone in range(int(self.share * units), 0, -1):
            choice = self.model_copy(update={"share": gone / units, "within": None})
            if all(self.step <= choice.kept(count) < count for count in counts):
                found.append(choice)
        return tuple(found)

    def check(self, header: ModelHeader) -> None:
        if self.within is not None:
            if not self.choices(header):
                raise invalid(
                    f"`{self.name}` has nothing to try: no share up to {self.share:.0%} leaves fewer units, in multiples of {self.step}.",
                    "Take a larger `share`" + (" or a smaller `multiple`." if self.step > 1 else "."),
                )
            return
        for count in set(self.counts(self.anatomy(header))):
            kept = self.kept(count)
            if kept < self.step:
                raise invalid(
                    f"`{self.name}` would leave nothing: {self.share:.0%} of {count} units, kept in multiples of {self.step}.",
                    "Take a smaller `share`.",
                )
            if kept >= count:
                raise invalid(
                    f"`{self.name}` would change nothing: {self.share:.0%} of {count} units is less than half a step of {self.step}.",
                    "Take a larger `share`" + (" or a smaller `multiple`." if self.step > 1 else "."),
                )

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        if header is None or self.within is not None:
            return
        counts = self.counts(self.anatomy(header))
        gone = 1 - sum(map(self.kept, counts)) / sum(counts)
        if abs(gone - self.share) > 0.02:
            yield f"`{self.name}`: a share of {self.share:.0%} becomes {gone:.0%}, since counts are whole."

    def leaves(self, header: ModelHeader) -> ModelHeader:
        if self.within is not None:  # nobody knows yet: at most what is there
            return header
        anatomy = self.anatomy(header)
        inner, counts = self.inner(anatomy), self.counts(anatomy)
        tensors = []
        for tensor in header.tensors:
            place = anatomy.place(tensor.name)
            tensors.append(tensor if place is None else self._narrowed(tensor, place, anatomy, inner, counts[place[0]]))
        return header.model_copy(
            update={"tensors": tuple(tensors), "config": self.config(header, tuple(map(self.kept, counts)))}
        )

    def config(self, header: ModelHeader, kept: tuple[int, ...]) -> dict[str, Any]:
        """Return the result's config.json. kept: number of units that stay in each block."""
        raise NotImplementedError

    def _narrowed(
        self, tensor: TensorInfo, place: tuple[int, str, str], anatomy: Anatomy, inner: Inner, count: int
    ) -> TensorInfo:
        _, module, leaf = place
        parts = dict(inner.inputs).get(module)
        shape = list(tensor.shape)
        if parts is not None:
            axis = len(shape) - 1 if anatomy.transposed else 0
            shape[axis] = self.kept(count) * sum(anatomy.part(part) for part in parts)
        elif module == inner.output and leaf == "weight":
            shape[0 if anatomy.transposed else 1] = self.kept(count) * anatomy.unit(inner)
        return reshaped(tensor, shape)


class Channels(Narrowing):
    """Remove feed-forward channels from every block. Matrices and files become smaller, and the model runs faster.

    With `across: layer` the result is a normal checkpoint. With `across: global` layers have different widths. A config can't express that,
    so only graphs can carry the result.
    """

    pass_: Literal["channels"] = Field("channels", alias="pass")
    multiple: int = Field(
        32, ge=1, le=1024, description="The number of channels that a layer keeps is a multiple of this."
    )

    @property
    def step(self) -> int:
        return self.multiple

    def inner(self, anatomy: Anatomy) -> Inner:
        return anatomy.family.feed_forward

    def counts(self, anatomy: Anatomy) -> tuple[int, ...]:
        return anatomy.widths

    def carriers(self, header: ModelHeader | None) -> frozenset[ExportFormat]:
        return GRAPHS if self.across == "global" else _ANY

    def why_not(self, header: ModelHeader | None) -> str:
        return "layers of differing widths can't be said in a config"

    def config(self, header: ModelHeader, kept: tuple[int, ...]) -> dict[str, Any]:
        if len(set(kept)) == 1:
            return {**header.config, self.anatomy(header).family.width: kept[0]}
        return own_shapes(header.config, "channels", kept)


class Heads(Narrowing):
    """Remove attention heads from every block. Query heads that share a key and value head are kept or removed together.

    The result is a normal checkpoint if a family's config has the width of a head (Llama, Mistral, Qwen, Gemma, Phi). If the config derives
    that width from the hidden size (BERT, RoBERTa, DistilBERT, GPT-2, OPT, GPT-NeoX), only graphs can carry the result.
    """

    pass_: Literal["heads"] = Field("heads", alias="pass")

    def inner(self, anatomy: Anatomy) -> Inner:
        return anatomy.family.attention

    def counts(self, anatomy: Anatomy) -> tuple[int, ...]:
        return anatomy.groups

    def check(self, header: ModelHeader) -> None:
        anatomy = self.anatomy(header)
        if anatomy.family.heads_fixed:
            raise invalid(
                f"`heads` can't take a {header.model_type}: {anatomy.family.heads_fixed}.",
                "Use `channels` or `layers`.",
            )
        super().check(header)

    def carriers(self, header: ModelHeader | None) -> frozenset[ExportFormat]:
        if self.across == "global":
            return GRAPHS
        if header is None:
            return _ANY
        if self.within is not None:
            return _ANY if self.anatomy(header).family.says_heads == "any" else GRAPHS
        return _ANY if self._sayable(header, tuple(map(self.kept, self.anatomy(header).groups))) else GRAPHS

    def why_not(self, header: ModelHeader | None) -> str:
        if self.across == "global":
            return "layers with differing counts of heads can't be said in a config"
        if header is not None and self.anatomy(header).family.says_heads == "divisors":
            hidden, group, most = (
                self.anatomy(header).hidden,
                self.anatomy(header).group,
                self.anatomy(header).groups[0],
            )
            fitting = [multiple * group for multiple in range(1, most) if hidden % (multiple * group) == 0]
            return f"a {header.model_type}'s count of heads must divide its hidden size of {hidden}: {', '.join(map(str, fitting)) or 'none fewer'} of {most * group} would"
        return f"the config of a {header.model_type if header else 'model like it'} ties the heads' width to the hidden size"

    def config(self, header: ModelHeader, kept: tuple[int, ...]) -> dict[str, Any]:
        anatomy = self.anatomy(header)
        if not self._sayable(header, kept):
            return own_shapes(header.config, "heads", tuple(anatomy.group * count for count in kept))
        changed = {**header.config, anatomy.family.heads: anatomy.group * kept[0], "head_dim": anatomy.head_dim}
        return changed | ({"num_key_value_heads": kept[0]} if "num_key_value_heads" in changed else {})

    def _sayable(self, header: ModelHeader, kept: tuple[int, ...]) -> bool:
        anatomy = self.anatomy(header)
        if len(set(kept)) > 1 or OWN_SHAPES in header.config:
            return False
        says = anatomy.family.says_heads
        return says == "any" or (says == "divisors" and anatomy.hidden % (anatomy.group * kept[0]) == 0)


def with_most(raw: object, field: str, most: float) -> object:
    """Return a pass's raw options: with `within` and without `field`, the field's largest value bounds the search."""
    searches = isinstance(raw, dict) and raw.get("within") is not None
    return {field: most, **raw} if searches and isinstance(raw, dict) else raw


def own_shapes(config: dict[str, Any], what: str, counts: tuple[int, ...]) -> dict[str, Any]:
    """Return a config with `nightpress_shapes`, which records each layer's own number of units. what: "channels" or "heads"."""
    return {**config, OWN_SHAPES: {**config.get(OWN_SHAPES, {}), what: list(counts)}}


def reshaped(tensor: TensorInfo, shape: Iterable[int]) -> TensorInfo:
    before = after = 1
    new = tuple(shape)
    for dim in tensor.shape:
        before *= dim
    for dim in new:
        after *= dim
    return replace(tensor, shape=new, size=tensor.size // before * after if before else 0)
