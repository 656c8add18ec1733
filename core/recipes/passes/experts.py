"""Options of the pass that removes experts of a mixture."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost, blocks_cost
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat, Need, PassOptions, Scope
from nightpress.core.recipes.passes.shrink import reshaped

#: Names of the number of experts in config.json, and of the number that each token goes to.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_top_k")
_ROUTERS = frozenset({"gate", "router"})


class Mixture(NamedTuple):
    """A mixture of experts in a model's files."""

    prefix: str  #: of its experts' tensors, e.g. "model.layers.0.mlp.experts."
    experts: int
    routers: tuple[str, ...]  #: names of the router's tensors, which have a row for each expert


def mixtures_of(tensors: Collection[TensorInfo]) -> tuple[Mixture, ...]:
    """Find the mixtures whose experts have tensors of their own, in the order of their first tensors."""
    experts: dict[str, int] = {}
    for tensor in tensors:
        if (found := re.match(r"(.*\.experts\.)(\d+)\.", tensor.name)) is not None:
            experts[found[1]] = max(experts.get(found[1], 0), int(found[2]) + 1)
    routers: dict[str, list[str]] = {prefix: [] for prefix in experts}
    for tensor in tensors:
        holder, _, _ = tensor.name.rpartition(".")
        above, _, leaf = holder.rpartition(".")
        prefix = f"{above}.experts."
        if leaf in _ROUTERS and prefix in experts and tensor.shape[:1] == (experts[prefix],):
            routers[prefix].append(tensor.name)
    return tuple(Mixture(prefix, count, tuple(routers[prefix])) for prefix, count in experts.items())


class ExpertPruning(PassOptions):
    """Remove experts from every mixture: those whose outputs, weighted by the router, are smallest on the calibration text (REAP, arXiv 2510.13999).

    The result is a normal checkpoint of a smaller mixture. Nothing is trained, and the router chooses among the experts that stay. Some
    models bear it and some don't, so set gates.
    """

    spreads: ClassVar[bool] = True
    needs: ClassVar[Need] = "calibration"
    scope: ClassVar[Scope] = "blocks"
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors", "compressed-tensors", "onnx", "openvino"})

    pass_: Literal["experts"] = Field("experts", alias="pass")
    share: float = Field(
        0.25, gt=0, lt=1, description="Share of the experts to remove from each mixture; the number is rounded."
    )

    def describe(self) -> str:
        return f"{self.share:.0%} fewer experts in every mixture, by the router's weight and the size of their outputs"

    def kept(self, count: int) -> int:
        """Return how many of `count` experts stay."""
        return round(count * (1 - self.share))

    def check(self, header: ModelHeader) -> None:
        mixtures = mixtures_of(header.tensors)
        if not mixtures or not all(mixture.routers for mixture in mixtures):
            raise invalid(
                "`experts` can't take this model: its files have no experts with tensors of their own and a router beside them.",
                "Take a mixture such as Mixtral, Qwen-MoE or OLMoE; for a dense model use `channels`, `heads` or `layers`.",
            )
        counts = {mixture.experts for mixture in mixtures}
        if len(counts) > 1 or not any(header.config.get(key) in counts for key in _COUNTS):
            raise invalid(
                f"`experts` can't take this model: its mixtures have {', '.join(map(str, sorted(counts)))} experts, and config.json names one number for all.",
                "Leave the pass out.",
            )
        groups = header.config.get("n_group")
        if isinstance(groups, int) and groups > 1:
            raise invalid(
                f"`experts` can't take this model: its router first chooses among {groups} groups of experts of equal size.",
                "Leave the pass out.",
            )
        (count,) = counts
        kept, chosen = self.kept(count), _first(header.config, _CHOSEN) or 1
        if kept < chosen:
            raise invalid(
                f"`experts` would leave {kept} of {count} experts, but each token goes to {chosen}.",
                f"Take a `share` of at most {1 - chosen / count:.2f}.",
            )
        if kept == count:
            raise invalid(
                f"`experts` would change nothing: {self.share:.0%} of {count} experts is less than half an expert.",
                "Take a larger `share`.",
            )

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        if header is None:
            return
        count = mixtures_of(header.tensors)[0].experts
        gone = 1 - self.kept(count) / count
        if abs(gone - self.share) > 0.02:
            yield f"`experts`: a share of {self.share:.0%} becomes {gone:.0%}, since counts are whole."

    def leaves(self, header: ModelHeader) -> ModelHeader:
        kept = {mixture.prefix: tuple(range(self.kept(mixture.experts))) for mixture in mixtures_of(header.tensors)}
        return self.without(header, kept)

    def without(self, header: ModelHeader, kept: Mapping[str, tuple[int, ...]]) -> ModelHeader:
        """Return the header of the model with only these experts, renumbered from 0. kept: prefix of a mixture → its experts that stay."""
        places = places_of(header.tensors, kept)
        tensors = []
        for tensor in header.tensors:
            if tensor.name not in places:
                tensors.append(tensor)
            elif (place := places[tensor.name]) is not None:
                tensors.append(info_after(tensor, place))
        count = len(next(iter(kept.values())))
        before = mixtures_of(header.tensors)[0].experts
        changed: dict[str, Any] = {key: count for key in _COUNTS if header.config.get(key) == before}
        return header.model_copy(update={"tensors": tuple(tensors), "config": {**header.config, **changed}})

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return blocks_cost(header, calibration, gram=False)


class Place(NamedTuple):
    """What becomes of a tensor of a mixture."""

    name: str  #: its new name
    rows: tuple[int, ...] | None  #: the rows that stay; None: all


def info_after(tensor: TensorInfo, place: Place) -> TensorInfo:
    """Return the description of a tensor after the pass."""
    shape = tensor.shape if place.rows is None else (len(place.rows), *tensor.shape[1:])
    return replace(reshaped(tensor, shape), name=place.name)


def places_of(tensors: Collection[TensorInfo], kept: Mapping[str, tuple[int, ...]]) -> dict[str, Place | None]:
    """Return for each tensor of a mixture what becomes of it; None: it is removed. Other tensors are left out. kept: as in `without`."""
    places: dict[str, Place | None] = {}
    for mixture in mixtures_of(tensors):
        number = {before: after for after, before in enumerate(kept[mixture.prefix])}
        for tensor in tensors:
            if tensor.name.startswith(mixture.prefix):
                expert, _, rest = tensor.name.removeprefix(mixture.prefix).partition(".")
                after = number.get(int(expert))
                places[tensor.name] = None if after is None else Place(f"{mixture.prefix}{after}.{rest}", None)
        places |= {name: Place(name, kept[mixture.prefix]) for name in mixture.routers}
    return places


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)
