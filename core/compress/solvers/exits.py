"""What a threshold on the scores of early exits costs and saves."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_CANDIDATES = 200  #: thresholds that are tried


@dataclass(frozen=True)
class ExitOutcome:
    """What a threshold comes to on some inputs."""

    threshold: float
    depth: float  #: blocks run, on average
    accuracy: float  #: share of right answers; of answers as at full depth where there are no labels
    share: tuple[float, ...]  #: of the inputs that leave at each head, and last at full depth


def exit_outcome(scores: Floats, right: NDArray[np.bool_], depths: NDArray[np.int64], threshold: float) -> ExitOutcome:
    """scores [E, N] of the heads before the end; right [E + 1, N]; depths [E + 1], blocks run up to each head."""
    sure = np.vstack([scores >= threshold, np.ones((1, scores.shape[1]), bool)])
    left = sure.argmax(axis=0)  # the first head that is sure
    at = np.arange(scores.shape[1])
    return ExitOutcome(
        threshold=threshold,
        depth=float(depths[left].mean()),
        accuracy=float(right[left, at].mean()),
        share=tuple(float((left == head).mean()) for head in range(len(depths))),
    )


def outcomes(scores: Floats, right: NDArray[np.bool_], depths: NDArray[np.int64]) -> list[ExitOutcome]:
    """What thresholds over the whole range of the scores come to, the lowest first, and last one that no score reaches."""
    candidates = np.unique(np.quantile(scores, np.linspace(0, 1, _CANDIDATES), method="nearest"))
    candidates = np.append(candidates, np.nextafter(np.float32(candidates[-1]), np.float32(np.inf)) + 1e-3)
    return [exit_outcome(scores, right, depths, float(candidate)) for candidate in candidates]


def choose(found: list[ExitOutcome], max_loss: float) -> ExitOutcome:
    """The one of least depth that loses no more than `max_loss` of the accuracy at full depth, which is the last one's."""
    allowed = [outcome for outcome in found if outcome.accuracy >= found[-1].accuracy - max_loss - 1e-12]
    return min(allowed, key=lambda outcome: (outcome.depth, -outcome.accuracy))
