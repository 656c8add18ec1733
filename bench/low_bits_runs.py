"""The runs of bench.low_bits, kept in files, and the figures that they come to."""

import json
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.record import Figure
from nightpress.core.recipes.calibration import MIXTURE, PROSE

DOMAINS = ("in domain", "out of domain")


@dataclass(frozen=True)
class Taken:
    """What a method lost with a seed."""

    method: str
    variant: int  #: index into the setting's list
    lost: tuple[float, ...]  #: nats over the float model, by domain
    divergence: tuple[float, ...]  #: KL in nats, by domain
    seconds: float


def keep_run(folder: Path, what: str, taken: Taken) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps({"what": what, "taken": asdict(taken)}) + "\n")


def read_runs(folder: Path) -> dict[str, list[Taken]]:
    """The runs that `keep_run` has written: what was measured → its runs."""
    found: dict[str, list[Taken]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            taken = {key: tuple(value) if isinstance(value, list) else value for key, value in row["taken"].items()}
            found.setdefault(row["what"], []).append(Taken(**taken))
    return found


def figures_of(model: str, name: str, taken: list[Taken]) -> list[Figure]:
    figures = []
    best: dict[tuple[str, int], float] = {}
    divergence: dict[tuple[str, int], float] = {}
    seconds: dict[str, float] = {}
    for method in dict.fromkeys(run.method for run in taken):
        runs = [run for run in taken if run.method == method]
        seconds[method] = statistics.mean(run.seconds for run in runs)
        for at, domain in enumerate(DOMAINS):
            by_variant = {
                variant: [run for run in runs if run.variant == variant] for variant in {run.variant for run in runs}
            }
            chosen = min(by_variant.values(), key=lambda group: statistics.mean(run.lost[at] for run in group))
            values = [run.lost[at] for run in chosen]
            best[method, at] = statistics.mean(values)
            figures.append(
                Figure(
                    f"{model}/{name}/{method} {domain}", round(best[method, at], 4), "nats", (min(values), max(values))
                )
            )
            kl = [run.divergence[at] for run in chosen]
            divergence[method, at] = statistics.mean(kl)
            figures.append(
                Figure(
                    f"{model}/{name}/{method} {domain} KL", round(statistics.mean(kl), 4), "nats", (min(kl), max(kl))
                )
            )
        figures.append(Figure(f"{model}/{name}/{method} seconds", round(seconds[method], 1), "s"))
    for at, domain in enumerate(DOMAINS):
        if ("learned", at) in best and ("auto-round", at) in best:
            ratio = best["learned", at] / best["auto-round", at]
            figures.append(Figure(f"{model}/{name}/learned over auto-round, {domain}", round(ratio, 3), bar="<= 0.9"))
        if ("learned", at) in best and ("nearest", at) in best:
            ratio = best["learned", at] / best["nearest", at]
            figures.append(Figure(f"{model}/{name}/learned over nearest, {domain}", round(ratio, 3), bar="<= 1"))
        for method in ("gptq", "learned"):
            if (method, at) in divergence and (f"{method}+recover", at) in divergence:
                share = 1 - divergence[f"{method}+recover", at] / divergence[method, at]
                bar = ">= 0.4" if name.startswith(("W3", "W4")) else ""
                figures.append(Figure(f"{model}/{name}/recovered of {method}, {domain} KL", round(share, 3), bar=bar))
    if {"learned", "auto-round"} <= seconds.keys():
        ratio = seconds["learned"] / seconds["auto-round"]
        figures.append(Figure(f"{model}/{name}/seconds over auto-round's", round(ratio, 3), bar="<= 0.5"))
    return figures


def mixture_over_prose(model: str, figures: list[Figure]) -> list[Figure]:
    """The loss after calibrating on the mixture, as a share of the loss after calibrating on prose."""
    known, found = {figure.name: figure.value for figure in figures}, []
    for name, value in known.items():
        path = name.removeprefix(f"{model} by {MIXTURE}/")
        prose = known.get(f"{model} by {PROSE}/{path}")
        if path != name and path.endswith(DOMAINS) and prose:
            found.append(Figure(f"{model} by {MIXTURE} over {PROSE}/{path}", round(value / prose, 3)))
    return found
