"""The accuracy and the depth of early exits, for each threshold on their scores."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_CANDIDATES = 200  #: thresholds that are tried


@dataclass(frozen=True)
class ExitOutcome:
    """The result of one threshold on some inputs."""

    threshold: float
    depth: float  #: blocks run, on average
    accuracy: float  #: share of right answers; without labels, share of answers that equal the full depth's
    share: tuple[float, ...]  #: share of the inputs that exit at each head; the last is full depth


def exit_outcome(scores: Floats, right: NDArray[np.bool_], depths: NDArray[np.int64], threshold: float) -> ExitOutcome:
    """Apply one threshold. An input exits at the first head whose score reaches it.

    scores [E, N]: scores of the heads before full depth. right [E + 1, N]: whether each head's answer is right. depths [E + 1]: blocks run
    up to each head.
    """
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
    """Apply thresholds over the whole range of the scores, the lowest first; the last is above every score. Shapes as in `exit_outcome`."""
    candidates = np.unique(np.quantile(scores, np.linspace(0, 1, _CANDIDATES), method="nearest"))
    candidates = np.append(candidates, np.nextafter(np.float32(candidates[-1]), np.float32(np.inf)) + 1e-3)
    return [exit_outcome(scores, right, depths, float(candidate)) for candidate in candidates]


def choose(found: list[ExitOutcome], max_loss: float) -> ExitOutcome:
    """Return the outcome of least depth whose accuracy is at most `max_loss` below the accuracy at full depth, the last outcome's."""
    allowed = [outcome for outcome in found if outcome.accuracy >= found[-1].accuracy - max_loss - 1e-12]
    return min(allowed, key=lambda outcome: (outcome.depth, -outcome.accuracy))
