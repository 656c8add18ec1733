"""The figures of bench.train, from the results of `--press` or `--measure`."""

from collections.abc import Iterator
from typing import Any

from bench.record import Figure

_ROWS, _POINTS = "of the test rows", "points"
#: names of the thresholds besides the chosen one: percentiles of the exits' scores; with the last, no text exits early
_THRESHOLDS = ("percentile 10", "percentile 30", "percentile 50", "percentile 70", "percentile 90", "none leaves")


def figures_of(found: dict[str, Any], device: str) -> list[Figure]:
    """The figures in the results of `--press` or of `--measure`."""
    source = found["source_accuracy"]
    figures = [Figure("source/accuracy", round(source, 4), _ROWS)]
    for name, result in found.items():
        if isinstance(result, dict) and "onnxruntime" in result:
            figures += _classifier(name, result, source)
        if isinstance(result, dict) and "test_accuracy" in result:
            figures.append(Figure(f"trained/{name}/accuracy", round(result["test_accuracy"], 4), _ROWS))
            figures.append(Figure(f"trained/{name}/seconds", result["seconds"], "s"))
    if "thresholds" in found.get("early-exit", {}):
        figures += _exits(found["early-exit"])
    if steps := found.get("steps"):
        where = device if "device" in found else "cpu"  # `--measure` runs on the processor
        figures += [Figure(f"steps/{where}/{side}", round(rate, 2), "steps/s") for side, rate in steps.items()]
    return figures


def _classifier(name: str, result: dict[str, Any], source: float) -> Iterator[Figure]:
    """The figures of a model beside its source, in two runtimes."""
    at = f"classifiers/{name}/"
    bar = "<= 2" if name == "prune" else ""
    yield Figure(f"{at}accuracy", round(result["accuracy"], 4), _ROWS)
    yield Figure(f"{at}of_the_source", round(result["of_the_source"], 4))
    yield Figure(f"{at}lost", round(100 * (source - result["accuracy"]), 1), _POINTS, bar=bar)
    for runtime in ("onnxruntime", "torch"):
        times = result[runtime]
        yield Figure(f"{at}{runtime}_source", round(times["source_mean_ms"], 1), "ms")
        yield Figure(f"{at}{runtime}", round(times["mean_ms"], 1), "ms")
        yield Figure(f"{at}{runtime}_faster", round(times["speedup"], 2), "×")


def _exits(result: dict[str, Any]) -> Iterator[Figure]:
    """The figures of each threshold, and of the threshold that was chosen on one half of the test rows and evaluated on the other."""
    chosen = result["at_chosen"]
    names = iter(_THRESHOLDS)
    for row in result["thresholds"]:
        at = f"thresholds/{'chosen' if row['threshold'] == chosen['threshold'] else next(names)}/"
        yield Figure(f"{at}threshold", round(row["threshold"], 4))
        yield Figure(f"{at}depth", round(row["depth"], 2), "blocks")
        yield Figure(f"{at}accuracy", round(row["accuracy"], 4), _ROWS)
        yield Figure(f"{at}lost", round(100 * row["lost"], 1), _POINTS)
        for name, key in (("source_mean", "source_mean_ms"), ("mean", "mean_ms"), ("source_p95", "source_p95_ms")):
            yield Figure(f"{at}{name}", round(row[key], 1), "ms")
        yield Figure(f"{at}p95", round(row["p95_ms"], 1), "ms")
        yield Figure(f"{at}faster", round(row["speedup"], 2), "×")
    cross = result["cross_chosen"]
    yield Figure("chosen/depth", round(cross["depth"], 2), "blocks")
    yield Figure("chosen/lost", round(100 * cross["lost"], 1), _POINTS, bar="<= 1")
    yield Figure("chosen/faster", round(chosen["speedup"], 2), "×", bar=">= 1.5")
