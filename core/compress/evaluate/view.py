"""The inputs of one evaluation: the outputs of the source and of an artifact for its examples, and methods that make figures of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.data.slices import Slices, draw
from nightpress.core.compress.evaluate.statistics import (
    TAIL,
    Array,
    Interval,
    Paired,
    Statistic,
    expanded_tail,
    interval,
    paired,
)
from nightpress.core.compress.evaluate.vectors import used_vectors
from nightpress.core.compress.export.consumer import Observed
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import Quality
from nightpress.core.recipes.sentence import EmbedderUse

Better = Literal["higher", "lower"]
FEWEST = 10  #: examples of a slice from which on a figure has an interval


@dataclass(frozen=True)
class ScorerRequest:
    """One entry of a recipe's `evaluate`, with everything that is needed to make its examples."""

    name: str  #: the name of the set of examples
    wanted: Quality
    source: tokenized.DataSource
    tokenizer: tokenized.Tokenizer
    header: ModelHeader
    seed: int
    prefix: tuple[int, ...] = ()  #: the first tokens of an encoder-decoder's decoder

    @property
    def ref(self) -> str:
        return self.wanted.data

    @property
    def vocabulary(self) -> int:
        return self.header.vocabulary or 1

    def invalid(self, what: str, hint: str) -> NightpressError:
        return NightpressError(
            ErrorCode.INVALID_DATA, f"The data set {self.ref} can't be used: {what}.", hint=hint, data=self.ref
        )

    def drawn(self, slices: Sequence[Hashable]) -> NDArray[np.int64]:
        """Indices of the rows to use: at most `samples`, in ascending order. slices: of each row, see `draw`."""
        return np.sort(draw(slices, self.wanted.samples, self.seed))


@dataclass(frozen=True)
class OutputPair:
    """The outputs of source and artifact for one set of examples. Without an artifact, `ours` and `theirs` are both the source's."""

    set_name: str
    ref: str
    source: Observed
    artifact: Observed | None
    seed: int
    sliced: bool = False  #: the figures are of one slice, which may have few examples
    #: key → which of the outputs belong to the examples that are compared; other outputs are compared whole
    kept: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    def only(self, examples: TokenSet, kept: NDArray[np.bool_]) -> "OutputPair":
        """The outputs for some of the examples. kept [N]."""
        masks = dict.fromkeys(("values", "tokens"), kept)
        targets, compared = examples.sequences.targets, examples.compared
        if targets is not None:
            masks |= dict.fromkeys(("nll", "top1"), kept[np.nonzero(targets >= 0)[0]])
        if compared is not None:
            masks |= dict.fromkeys(("kl", "products"), kept[np.nonzero(compared)[0]])
        return replace(self, kept=masks)

    @property
    def compares(self) -> bool:
        return self.artifact is not None

    def theirs(self, key: str) -> NDArray[Any]:
        return self._outputs(self.source, key)

    def ours(self, key: str) -> NDArray[Any]:
        return self._outputs(self.artifact or self.source, key)

    def _outputs(self, observed: Observed, key: str) -> NDArray[Any]:
        found = observed.outputs[f"{self.set_name}.{key}"]
        return found[self.kept[key]] if key in self.kept else found

    def vectors(self, side: Callable[[str], NDArray[Any]], use: EmbedderUse) -> Array:
        """An embedder's vectors [N, D] as a user of one side's folder gets them. side: `self.ours` or `self.theirs`."""
        observed = self.artifact if side == self.ours and self.artifact is not None else self.source
        return used_vectors(side("values"), use, observed.loaded_as.get("truncate_dim"))

    def figure(
        self,
        name: str,
        statistic: Callable[[Callable[[str], NDArray[Any]]], Statistic],
        count: int,
        *,
        n: int,
        better: Better,
        unit: str = "",
        of: str = "",
    ) -> Measurement:
        """A figure that source and artifact both have, with its change.

        statistic: makes the statistic from a function that returns one side's outputs by key. count: examples to resample; n: examples
        behind the figure, for the report.
        """
        tail = expanded_tail(count) if self.sliced else TAIL
        both = paired(statistic(self.ours), statistic(self.theirs), count, seed=self.seed, tail=tail)
        return self._of(count, self.compared(name, both, n=n, better=better, unit=unit, of=of))

    def compared(self, name: str, both: Paired, *, n: int, better: Better, unit: str = "", of: str = "") -> Measurement:
        change = both.change if self.compares else None
        return self.alone(name, both.figure, n=n, better=better, unit=unit, of=of).model_copy(
            update={
                "change": change.value if change else None,
                "change_low": change.low if change else None,
                "change_high": change.high if change else None,
            }
        )

    def alone(self, name: str, found: Interval, *, n: int, better: Better, unit: str = "", of: str = "") -> Measurement:
        """A figure without a change: it compares the artifact with the source, and the source alone does not have it."""
        return Measurement(
            name=name,
            value=found.value,
            low=found.low,
            high=found.high,
            n=n,
            unit=unit,
            better=better,
            data=self.ref,
            of=of,
        )

    def resampled(
        self, name: str, statistic: Statistic, count: int, *, n: int, better: Better, unit: str = "", of: str = ""
    ) -> Measurement:
        tail = expanded_tail(count) if self.sliced else TAIL
        found = interval(statistic, count, seed=self.seed, tail=tail)
        return self._of(count, self.alone(name, found, n=n, better=better, unit=unit, of=of))

    def _of(self, count: int, measured: Measurement) -> Measurement:
        """A figure of so many examples. One of a slice with too few has no interval."""
        return without_interval(measured) if self.sliced and count < FEWEST else measured


def without_interval(measured: Measurement) -> Measurement:
    return measured.model_copy(update=dict.fromkeys(("low", "high", "change_low", "change_high")))


class Scorer(Protocol):
    """One evaluation: the examples that are run, and the figures that are made of the outputs."""

    @property
    def examples(self) -> TokenSet: ...

    @property
    def slices(self) -> Slices | None:
        """The slice of each unit that is resampled: a text, question, query or pair. None: the data has no slices."""

    def figures(self, view: OutputPair) -> list[Measurement]: ...

    def part(self, view: OutputPair, units: NDArray[np.bool_]) -> list[Measurement]:
        """The figures of some of the units. units [U]."""


@dataclass(frozen=True)
class OfExamples(ABC):
    """A scorer whose units are its examples."""

    examples: TokenSet

    @abstractmethod
    def figures(self, view: OutputPair) -> list[Measurement]: ...

    def take(self, units: NDArray[np.bool_]) -> Self:
        """The scorer of some of its examples. units [N]. To be extended where a scorer holds more of each example."""
        return replace(self, examples=self.examples.take(units))

    @property
    def slices(self) -> Slices | None:
        return self.examples.sequences.slices

    def part(self, view: OutputPair, units: NDArray[np.bool_]) -> list[Measurement]:
        return self.take(units).figures(view.only(self.examples, units))


@dataclass(frozen=True)
class Evaluation:
    """One entry of the recipe's `evaluate`, with its examples."""

    ref: str
    scorer: Scorer


def spread(positions: NDArray[np.int64], width: int, shape: tuple[int, ...], limit_bytes: int) -> NDArray[np.bool_]:
    """A mask of `shape` that marks some of the scored positions, evenly spread. Their whole distributions are kept.

    At most 512 positions, with at most `limit_bytes` of float32 distributions of `width` numbers each.
    """
    count = max(1, min(len(positions), 512, limit_bytes // (4 * width)))
    chosen = np.zeros(shape, bool)
    chosen.ravel()[positions[np.linspace(0, len(positions) - 1, count).astype(np.int64)]] = True
    return chosen


def sums(group: NDArray[np.int64], values: NDArray[Any], count: int) -> Array:
    """Sum up one number per token to one per text. Texts are resampled, because the tokens of a text are not independent.

    group [M]: index of each token's text; values [M] → [count] float64.
    """
    return np.bincount(group, values.astype(np.float64), minlength=count).astype(np.float64)
