"""Formats the report's figures: names, digits, intervals."""

from nightpress.core.handoff.report import Measurement

_NAMES = {
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "masked_accuracy": "Hidden words guessed",
    "accuracy": "Accuracy",
    "f1": "F1, macro",
    "class_f1": "F1",
    "entity_f1": "Entity F1",
    "choice_accuracy": "Multiple choice",
    "flips": "Answers that differ from the source’s",
    "right_to_wrong": "Right answers that became wrong",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "ndcg": "nDCG",
    "recall": "Recall",
    "mrr": "Mean reciprocal rank",
    "neighbour_recall": "Neighbours of the source found",
    "kendall_tau": "Kendall’s τ with the source",
    "generation_match": "Texts written alike",
    "prefix_match": "Tokens written alike",
    "cosine": "Cosine with the source",
    "centred_cosine": "Cosine with the source, centred",
    "top1_agreement": "Top-1 agreement with the source",
    "label_agreement": "Labels given alike",
    "rank_correlation": "Rank correlation with the source",
    "correlation": "Correlation with the source",
    "mean_error": "Mean error against the source",
    "largest_error": "Largest error against the source",
    "kl_divergence": "KL divergence from the source",
    "kl_median": "KL divergence, median",
    "kl_p90": "KL divergence, 90th percentile",
    "kl_p99": "KL divergence, 99th percentile",
    "kl_p999": "KL divergence, 99.9th percentile",
    "kl_max": "KL divergence, largest",
    "rms_dp": "RMS change of the right token’s probability",
}
_SHARES = frozenset(
    {
        "accuracy",
        "choice_accuracy",
        "flips",
        "right_to_wrong",
        "masked_accuracy",
        "top1_agreement",
        "label_agreement",
        "generation_match",
        "prefix_match",
        "rms_dp",
        "recall",
        "neighbour_recall",
    }
)
#: metrics that are shown with five digits
_FINE = frozenset(
    {"cosine", "centred_cosine", "kl_divergence", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max"}
    | {"kendall_tau", "rank_correlation", "correlation", "mean_error"}
)


def metric_name(measurement: Measurement) -> str:
    """The name of a figure for a reader, e.g. `nDCG@10` or `F1 of negative`."""
    rank = measurement.unit if measurement.unit.startswith("@") else ""
    return (
        _NAMES.get(measurement.name, measurement.name.replace("_", " "))
        + rank
        + (f" of {measurement.of}" if measurement.of else "")
    )


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def figure(measurement: Measurement) -> str:
    """Value and interval as text, with enough digits to tell them apart from each other and from 1."""
    known = measurement.low is not None and measurement.high is not None
    ends = (
        f" [{shown(measurement.low, measurement.name)}, {shown(measurement.high, measurement.name)}]" if known else ""
    )
    return shown(measurement.value, measurement.name) + ends


def shown(value: float | None, metric: str) -> str:
    """A value of this metric as text, with the metric's number of digits."""
    if value is None:
        return "–"
    metric = metric.split("[")[0]  # without a slice
    if metric in _SHARES:
        return f"{value:.1%}"
    return f"{value:.{5 if metric in _FINE else 3}f}"


def change(measurement: Measurement) -> str:
    """The change from the source as text, with its interval if it has one."""
    if measurement.change is None:
        return ""
    if measurement.change_low is None or measurement.change_high is None:
        return f"{measurement.change:+.2%}"
    return f"{measurement.change:+.2%} [{measurement.change_low:+.2%}, {measurement.change_high:+.2%}]"
