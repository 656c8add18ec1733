"""The inputs of one evaluation: the outputs of the source and of an artifact for its examples, and methods that make figures of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.evaluate.statistics import Array, Interval, Paired, Statistic, interval, paired
from nightpress.core.compress.evaluate.vectors import used_vectors
from nightpress.core.compress.export.consumer import Observed
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import Quality
from nightpress.core.recipes.sentence import EmbedderUse

Better = Literal["higher", "lower"]


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

    def drawn(self, count: int) -> NDArray[np.int64]:
        """Indices of the rows to use, drawn from `count` rows: at most `samples`, in ascending order."""
        order = np.random.default_rng(self.seed).permutation(count)[: self.wanted.samples]
        return np.sort(order).astype(np.int64)


@dataclass(frozen=True)
class OutputPair:
    """The outputs of source and artifact for one set of examples. Without an artifact, `ours` and `theirs` are both the source's."""

    set_name: str
    ref: str
    source: Observed
    artifact: Observed | None
    seed: int

    @property
    def compares(self) -> bool:
        return self.artifact is not None

    def theirs(self, key: str) -> NDArray[Any]:
        return self.source.outputs[f"{self.set_name}.{key}"]

    def ours(self, key: str) -> NDArray[Any]:
        return (self.artifact or self.source).outputs[f"{self.set_name}.{key}"]

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
        both = paired(statistic(self.ours), statistic(self.theirs), count, seed=self.seed)
        return self.compared(name, both, n=n, better=better, unit=unit, of=of)

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
        return self.alone(name, interval(statistic, count, seed=self.seed), n=n, better=better, unit=unit, of=of)


class Scorer(Protocol):
    """One evaluation: the examples that are run, and the figures that are made of the outputs."""

    @property
    def examples(self) -> TokenSet: ...

    def figures(self, view: OutputPair) -> list[Measurement]: ...


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
