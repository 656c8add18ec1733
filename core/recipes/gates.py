"""Gates: bounds on a result's figures. Recipes, studies and searches inside a pass use the same text for them."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

_BOUND = re.compile(r"^\s*(<=|>=|<|>)\s*([+-]?\d+(?:\.\d+)?)\s*(%|x)?(?:\s+(source|runtime|best))?\s*$")
_GATE = re.compile(r"^\s*([a-z0-9_]+(?:\[[^\[\]]+\])?)\s*((?:<=|>=|<|>).+)$")
_FIGURE = re.compile(r"^([a-z0-9_]+)(?:\[\s*([^\[\]]*[^\[\]\s])\s*\])?$")


class Gate(BaseModel):
    """A bound that decides the verdict. Relative bounds compare with the source: `<= +3%` (change), `<= 35%` (share), `>= 1.5x` (times)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    operator: Literal["<=", ">=", "<", ">"]
    value: float
    relative: Literal["absolute", "change", "share", "times"]
    #: What a speed is compared with: the source, the uncompressed model in the artifact's own runtime, or whichever of the two is faster.
    against: Literal["source", "runtime", "best"] = "source"
    slice: str = ""  #: the slice of the data that the figure is of; `*`: of each, so that the worst decides; "": all data together

    @property
    def is_upper(self) -> bool:
        """Whether smaller figures are better."""
        return self.operator in {"<=", "<"}

    def __str__(self) -> str:
        number = {
            "absolute": f"{self.value:g}",
            "change": f"{self.value * 100:+g}%",
            "share": f"{self.value * 100:g}%",
            "times": f"{self.value:g}x",
        }
        against = "" if self.against == "source" else f" {self.against}"
        figure = f"{self.metric}[{self.slice}]" if self.slice else self.metric
        return f"{figure} {self.operator} {number[self.relative]}{against}"


#: Gates on them may name what the speed is compared with.
_SPEEDS = frozenset({"latency", "throughput", "prefill_tokens_per_s", "decode_tokens_per_s"})

#: Figures of the whole artifact, which no slice of a data set has.
_OF_ARTIFACTS = _SPEEDS | {"size", "memory"}

GATE_METRICS = (
    "size",
    "latency",
    "throughput",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "memory",
    "perplexity",
    "bits_per_byte",
    "masked_accuracy",
    "accuracy",
    "f1",
    "entity_f1",
    "choice_accuracy",
    "flips",
    "right_to_wrong",
    "spearman",
    "pearson",
    "ndcg",
    "recall",
    "mrr",
    "neighbour_recall",
    "kendall_tau",
    "generation_match",
    "prefix_match",
    "cosine",
    "centred_cosine",
    "top1_agreement",
    "label_agreement",
    "kl_divergence",
    "kl_median",
    "kl_p90",
    "kl_p99",
    "kl_p999",
    "kl_max",
    "rms_dp",
    "rank_correlation",
    "correlation",
    "mean_error",
    "largest_error",
)


def parse_gate(metric: str, bound: str) -> Gate:
    """Parse a bound. A signed percentage is a change, an unsigned percentage a share of the source, `x` a factor.

    metric: the figure, perhaps with a slice: `kl_divergence[code]`, or `kl_divergence[*]` for every slice. A relative bound on a speed may
    end in `runtime` or `best`; see Gate.

    Raises ValueError for an unknown metric or an invalid bound.
    """
    match, named = _BOUND.match(bound), _FIGURE.match(metric)
    whole, (metric, part) = metric, named.groups() if named else (metric, None)
    if metric not in GATE_METRICS:
        raise ValueError(f"gate {metric!r} is not one of {', '.join(GATE_METRICS)}")
    if part is not None and metric in _OF_ARTIFACTS:
        raise ValueError(f"gate {whole!r}: {metric} is of the whole artifact, not of a slice of the data")
    if not match:
        raise ValueError(f"gate {metric}: {bound!r} is not a bound like '<= +3%', '<= 35%', '>= 1.5x' or '>= 0.99'")
    operator, number, unit, against = match.groups()
    if against is not None and (unit is None or metric not in _SPEEDS):
        raise ValueError(
            f"gate {metric}: {against!r} belongs to a relative bound on a speed, e.g. latency: '<= 0.7x {against}'"
        )
    value = float(number)
    if unit == "%":
        kind, value = ("change" if number[0] in "+-" else "share"), value / 100
    else:
        kind = "times" if unit == "x" else "absolute"
    gate = {
        "metric": metric,
        "operator": operator,
        "value": value,
        "relative": kind,
        "against": against or "source",
        "slice": part or "",
    }
    return Gate.model_validate(gate)


def read_gate(text: str) -> tuple[str, str]:
    """Split a gate such as `perplexity <= +1%` into figure and bound. Raises ValueError."""
    match = _GATE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a gate like 'perplexity <= +1%' or 'accuracy >= -1%'")
    figure, bound = match.groups()
    parse_gate(figure, bound)
    return figure, bound.strip()
