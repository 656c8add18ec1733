"""When an input has been looked at enough: scores of heads, and what a threshold on them costs and saves."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nightpress.core.recipes.passes.adapt import Policy

Floats = NDArray[np.float64]
_CANDIDATES = 200  #: thresholds that are tried


def exit_scores(logits: Sequence[Tensor], mask: Tensor, policy: Policy) -> list[Tensor]:
    """How sure each head is: logits [B, C] of each and mask [B, S] → [B] of each, none of which depends on a later head. An input leaves at the first head whose score reaches the threshold.

    Confidence and entropy lie in 0…1; patience counts the heads before that said the same without a break; length is heads passed per token.
    """
    if policy == "length":
        return [(at + 1) / mask.sum(1).float() for at in range(len(logits))]
    if policy == "patience":
        said = [one.argmax(-1) for one in logits]
        runs = [torch.zeros_like(said[0], dtype=torch.float32)]
        for before, now in itertools.pairwise(said):
            runs.append((runs[-1] + 1) * (now == before))
        return runs
    return [_certainty(one, policy) for one in logits]


def _certainty(logits: Tensor, policy: Policy) -> Tensor:
    logp = torch.log_softmax(logits.float(), dim=-1)
    if policy == "confidence":
        return logp.amax(-1).exp()
    entropy = -(logp.exp() * logp).sum(-1)
    return 1 - entropy / math.log(logits.shape[-1])


@dataclass(frozen=True)
class Outcome:
    """What a threshold comes to on some inputs."""

    threshold: float
    depth: float  #: blocks run, on average
    accuracy: float  #: share of right answers; of answers as at full depth where there are no labels
    share: tuple[float, ...]  #: of the inputs that leave at each head, and last at full depth


def outcome(scores: Floats, right: NDArray[np.bool_], depths: NDArray[np.int64], threshold: float) -> Outcome:
    """scores [E, N] of the heads before the end; right [E + 1, N]; depths [E + 1], blocks run up to each head."""
    sure = np.vstack([scores >= threshold, np.ones((1, scores.shape[1]), bool)])
    left = sure.argmax(axis=0)  # the first head that is sure
    at = np.arange(scores.shape[1])
    return Outcome(
        threshold=threshold,
        depth=float(depths[left].mean()),
        accuracy=float(right[left, at].mean()),
        share=tuple(float((left == head).mean()) for head in range(len(depths))),
    )


def outcomes(scores: Floats, right: NDArray[np.bool_], depths: NDArray[np.int64]) -> list[Outcome]:
    """What thresholds over the whole range of the scores come to, the lowest first, and last one that no score reaches."""
    candidates = np.unique(np.quantile(scores, np.linspace(0, 1, _CANDIDATES), method="nearest"))
    candidates = np.append(candidates, np.nextafter(np.float32(candidates[-1]), np.float32(np.inf)) + 1e-3)
    return [outcome(scores, right, depths, float(one)) for one in candidates]


def choose(found: list[Outcome], max_loss: float) -> Outcome:
    """The one of least depth that loses no more than `max_loss` of the accuracy at full depth, which is the last one's."""
    allowed = [one for one in found if one.accuracy >= found[-1].accuracy - max_loss - 1e-12]
    return min(allowed, key=lambda one: (one.depth, -one.accuracy))
