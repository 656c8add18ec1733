"""Structured pruning: the options of the pass that removes whole blocks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from nightpress.core.recipes.anatomy import BY_LAYER, Anatomy, blocks_of
from nightpress.core.recipes.header import SHARED_BLOCKS, ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.shrink import Shrinking, with_most

_MOST_BLOCKS = 1000


class Layers(Shrinking):
    """Remove whole blocks, those that change the hidden states least (ShortGPT, arXiv 2403.03853). The result is a normal checkpoint."""

    pass_: Literal["layers"] = Field("layers", alias="pass")
    count: int = Field(
        1,
        ge=1,
        le=_MOST_BLOCKS,
        description="Number of blocks to remove. With `within`: the largest number to try, by default all but one.",
    )
    importance: Literal["block-influence", "taylor"] = Field(
        "block-influence",
        description="How a block's importance is measured: one minus the cosine between its inputs and its outputs, or the change of the model's loss without it.",
    )
    remove: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, max_length=1000, description="Remove these blocks, counted from 0, in place of `count` and `importance`."
    )

    @model_validator(mode="before")
    @classmethod
    def _remove_gives_count(cls, raw: object) -> object:
        raw = with_most(raw, "count", _MOST_BLOCKS)
        if not isinstance(raw, dict) or not isinstance(raw.get("remove"), list | tuple):
            return raw
        if raw.get("within") is not None:
            raise ValueError("`remove` names the blocks that `within` would choose: leave one out")
        named = raw["remove"]
        if not all(isinstance(block, int) for block in named):
            return raw  # pydantic says what is wrong with each
        if not named or len(set(named)) != len(named):
            raise ValueError("`remove` names no block, or one twice")
        if raw.get("count") not in (None, len(named)):
            raise ValueError(f"`remove` names {len(named)} blocks; leave `count` out")
        return {**raw, "count": len(named)}

    def anatomy(self, header: ModelHeader) -> Anatomy:
        return blocks_of(header, self.name) if header.model_type not in SHARED_BLOCKS else super().anatomy(header)

    @property
    def by_gradient(self) -> bool:
        return self.importance == "taylor"

    def describe(self) -> str:
        if self.remove is not None:
            return f"blocks {', '.join(map(str, self.remove))} go"
        if self.within is not None:
            return f"as many blocks fewer as keep {self.within}, by {self.importance}"
        return f"{self.count} block{'s' * (self.count > 1)} fewer, by {self.importance}"

    @property
    def extent(self) -> str:
        return f"{self.count} block{'s' * (self.count > 1)} removed"

    def choices(self, header: ModelHeader) -> tuple[Self, ...]:
        most = min(self.count, self.anatomy(header).layers - 1)
        return tuple(self.model_copy(update={"count": count, "within": None}) for count in range(most, 0, -1))

    def check(self, header: ModelHeader) -> None:
        layers = self.anatomy(header).layers
        if self.count >= layers and (self.within is None or layers == 1):
            raise invalid(
                f"`layers` would leave nothing: the model has {layers} blocks, and {self.count} would go.",
                "Take fewer.",
            )
        if self.remove is not None and max(self.remove) >= layers:
            raise invalid(
                f"`layers`: there is no block {max(self.remove)}; the model has {layers}.",
                f"Blocks are counted from 0 to {layers - 1}.",
            )

    def leaves(self, header: ModelHeader) -> ModelHeader:
        if self.within is not None:  # nobody knows yet: at most what is there
            return header
        layers = self.anatomy(header).layers
        gone = set(self.remove or range(layers - self.count, layers))
        return self.without(header, [at for at in range(layers) if at not in gone])

    def without(self, header: ModelHeader, kept: list[int]) -> ModelHeader:
        """Return the header of the model with only the blocks `kept`, renumbered from 0."""
        anatomy = self.anatomy(header)
        number = {before: after for after, before in enumerate(kept)}
        tensors = []
        for tensor in header.tensors:
            place = anatomy.place(tensor.name)
            if place is None:
                tensors.append(tensor)
            elif place[0] in number:
                tensors.append(replace(tensor, name=renumbered(tensor.name, anatomy, number)))
        config = {**header.config, anatomy.family.layers: len(kept), **_stages(header.config, len(kept))}
        for key in BY_LAYER:
            if isinstance(config.get(key), list) and len(config[key]) == anatomy.layers:
                config[key] = [config[key][at] for at in kept]
        if "max_window_layers" in config and isinstance(config["max_window_layers"], int):
            config["max_window_layers"] = sum(at < config["max_window_layers"] for at in kept)
        return header.model_copy(update={"tensors": tuple(tensors), "config": config})


def _stages(config: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """The keys by which a model that sees names its blocks, for so many: those who take its hidden states take the last."""
    names = config.get("stage_names")
    if not isinstance(names, list):
        return {}
    left = names[: blocks + 1]  # the first is that of the patches
    return {"stage_names": left, "out_features": left[-1:], "out_indices": [len(left) - 1]}


def renumbered(name: str, anatomy: Anatomy, number: dict[int, int]) -> str:
    """Return the name of a block's tensor with the block's new number. number: old number → new number."""
    old, _, rest = name.removeprefix(anatomy.prefix).partition(".")
    return f"{anatomy.prefix}{number[int(old)]}.{rest}"
