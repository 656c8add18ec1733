"""Which figures of a report's slices are shown, for the report's pages and the command line."""

from collections.abc import Sequence

from nightpress.core.handoff.report import Measurement, Slice

MOST = 6  #: figures of a slice that a table shows
_ORDER = (
    *("perplexity", "masked_accuracy", "accuracy", "choice_accuracy", "entity_f1", "spearman", "ndcg"),
    *("kl_divergence", "flips", "right_to_wrong", "top1_agreement", "label_agreement", "kl_p99"),
    *("kendall_tau", "generation_match", "prefix_match", "cosine", "centred_cosine", "neighbour_recall"),
    *("mean_error", "rank_correlation", "f1", "mrr", "recall", "bits_per_byte"),
)


def figures_shown(slices: Sequence[Slice]) -> list[str]:
    """The names of the figures that a table of these slices shows; report.json has all."""
    known = {figure.name for part in slices for figure in part.measurements}
    return [name for name in _ORDER if name in known][:MOST]


def figure_of(part: Slice, name: str) -> Measurement | None:
    """A figure of a slice by its name; None: it was not measured."""
    return next((figure for figure in part.measurements if figure.name == name and not figure.of), None)
