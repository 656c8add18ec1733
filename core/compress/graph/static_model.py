"""All graphs of a model in static int8: one, or an encoder's and a decoder's. Layers are named over both."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.graph.samples import Samples, feeders, session
from nightpress.core.compress.graph.static_graph import QdqGraph
from nightpress.core.compress.graph.static_ranges import calibrated
from nightpress.core.compress.grids.activation_ranges import Range
from nightpress.core.handoff.report import LayerEffect
from nightpress.core.recipes.passes import StaticInt8


@dataclass(frozen=True)
class StaticModel:
    plans: Mapping[str, QdqGraph]  #: by the graph's name, as in `Traced.graphs`
    ranges: Mapping[str, Mapping[str, Range]]  #: the range of each rounded tensor, for each graph
    costs: Mapping[str, float]  #: layer → its own rounding error

    @classmethod
    def calibrate(
        cls,
        graphs: Mapping[str, Path],
        samples: Samples,
        options: StaticInt8,
        bits: int,
        folder: Path,
        context: PassContext,
    ) -> "StaticModel":
        """Run the samples through each graph. A decoder reads the float encoder's answers. Another attempt finds the results in `folder`."""
        encoder = session(next(iter(graphs.values())), context.threads) if len(graphs) > 1 else None
        plans, ranges = {}, {}
        costs: dict[str, float] = {}
        for name, feeder in feeders(samples, encoder).items():
            found = calibrated(graphs[name], feeder, len(samples), options, bits, folder / name, context)
            plans[name], ranges[name] = found[:2]
            costs |= found[2]
        return cls(plans, ranges, costs)

    def written(self, left: Collection[str]) -> dict[str, bytes]:
        """Each graph with all layers in int8, except those in `left`."""
        return {name: plan.written(self.ranges[name], left) for name, plan in self.plans.items()}

    def work(self, length: int) -> dict[str, int]:
        """Layer → its multiply-adds for each token, in texts of `length` tokens."""
        return {layer: work for plan in self.plans.values() for layer, work in plan.work(length).items()}

    @property
    def products(self) -> frozenset[str]:
        """The products with weights."""
        return frozenset(name for plan in self.plans.values() for name in plan.inputs)

    @property
    def scores(self) -> frozenset[str]:
        """The products of queries and keys."""
        return frozenset(name for plan in self.plans.values() for name in plan.scores)

    def effects(self, left: Collection[str]) -> tuple[LayerEffect, ...]:
        """The rounding error of each weight, with the layers `left` in float."""
        return tuple(effect for plan in self.plans.values() for effect in plan.effects(left))
