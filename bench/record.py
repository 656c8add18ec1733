"""Records the figures of benchmarks in bench/results/NAME.json. All figures in the docs come from these files.

A file holds runs. The figures of a run were measured together: on one machine, at one commit, on one day. A later run replaces the figures
that it measures again. The others stay, with their own machine and date. `python -m docs.figures` writes the docs' tables from these files.
"""

import argparse
import dataclasses
import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"  #: runs that the docs show
OUT = BENCH / "out"  #: runs with other options than the defaults: not tracked, and not shown
LIBRARIES = (
    *("torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "compressed-tensors", "llama-cpp-python"),
    *("fastapi", "sqlalchemy", "psycopg", "celery", "boto3", "numpy"),
)
_COMPARISONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}


@dataclass(frozen=True)
class Figure:
    """One measured value."""

    name: str  #: parts joined by "/": optional group, optional row, and column
    value: float
    unit: str = ""
    spread: tuple[float, float] | None = None  #: lowest and highest value, or an interval: depends on the benchmark
    bar: str = ""  #: the required value: a comparison and a number, e.g. ">= 0.8"

    def __post_init__(self) -> None:
        if self.bar and self.bar.split(" ")[0] not in _COMPARISONS:
            raise ValueError(f"The bar {self.bar!r} of {self.name} must begin with one of {', '.join(_COMPARISONS)}.")

    @property
    def meets_bar(self) -> bool | None:
        """Whether the value meets the bar. None if there is no bar."""
        if not self.bar:
            return None
        sign, bound = self.bar.split(" ")
        return bool(_COMPARISONS[sign](self.value, float(bound)))

    @property
    def verdict(self) -> str:
        return {None: "", True: "PASS", False: "MISS"}[self.meets_bar]


@dataclass(frozen=True)
class Machine:
    """The machine of a run. Unknown values are None or empty."""

    processor: str
    features: tuple[str, ...]  #: instruction sets that matter for int8 and bfloat16
    cores: int | None
    memory_gib: int | None
    gpu: str | None

    @classmethod
    def here(cls) -> "Machine":
        from nightpress.core.processor import cpu_features, processor

        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        features = tuple(cpu_features())
        return cls(processor(), features, os.cpu_count(), round(memory / 2**30), _gpu())


@dataclass(frozen=True)
class Run:
    """Figures that were measured together."""

    date: str
    commit: str  #: a "+" at the end: with uncommitted changes; empty outside of a checkout
    machine: Machine
    versions: dict[str, str]
    figures: tuple[Figure, ...]
    transcribed: bool = False  #: copied from a page of that commit, not written by the benchmark
    note: str = ""  #: conditions that a reader must know


def _gpu() -> str | None:
    if "torch" not in sys.modules:  # a benchmark that uses a GPU has imported torch
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=BENCH.parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", ".", ":!bench/results")  # earlier benchmarks write their results there
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read(name: str, folder: Path = RESULTS) -> tuple[Run, ...]:
    """All runs of a benchmark, oldest first. Raises FileNotFoundError."""
    return tuple(_run(document) for document in json.loads((folder / f"{name}.json").read_text())["runs"])


def _run(document: dict[str, Any]) -> Run:
    machine = Machine(**{**document["machine"], "features": tuple(document["machine"]["features"])})
    figures = tuple(
        Figure(**{**figure, "spread": tuple(figure["spread"])}) if "spread" in figure else Figure(**figure)
        for figure in document["figures"]
    )
    return Run(**{**document, "machine": machine, "figures": figures})


def write(name: str, runs: Iterable[Run], folder: Path = RESULTS) -> Path:
    """Write runs, with one figure per line, so that a changed figure changes one line. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for run in runs:
        document = dataclasses.asdict(run)
        figures = [_compact(figure) for figure in document.pop("figures")]
        document = {key: value for key, value in document.items() if key not in {"transcribed", "note"} or value}
        head = json.dumps(document, ensure_ascii=False, indent=1).removesuffix("\n}").replace("\n", "\n  ")
        parts.append(f"  {head},\n   " + '"figures": [\n    ' + ",\n    ".join(figures) + "\n   ]\n  }")
    path = folder / f"{name}.json"
    path.write_text(f'{{\n "bench": {json.dumps(name)},\n "runs": [\n' + ",\n".join(parts) + "\n ]\n}\n")
    return path


def _compact(figure: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in figure.items() if value not in (None, "")}, ensure_ascii=False)


def add(name: str, run: Run, folder: Path = RESULTS) -> Path:
    """Add a run. Its figures replace earlier figures of the same names. Returns the file."""
    taken = {figure.name for figure in run.figures}
    if len(taken) < len(run.figures):
        raise ValueError(f"The bench {name} gave two figures the same name.")
    runs = []
    for earlier in read(name, folder) if (folder / f"{name}.json").exists() else ():
        left = tuple(figure for figure in earlier.figures if figure.name not in taken)
        if left:
            runs.append(dataclasses.replace(earlier, figures=left))
    return write(name, [*runs, run], folder)


def finish(
    name: str,
    figures: Sequence[Figure],
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    *,
    choices: Sequence[str] = (),
) -> int:
    """Print and record the figures. Returns the exit status: 1 if a figure missed its bar, else 0.

    A run with the parser's defaults is recorded in bench/results, any other in bench/out, because it measured something else. `choices`:
    names of options that only select which figures are measured.
    """
    usual = all(parser.get_default(key) == value for key, value in vars(options).items() if key not in choices)
    kept = keep(name, figures, RESULTS if usual else OUT)
    print(f"kept in {kept.relative_to(BENCH.parent)}", file=sys.stderr)
    return int(any(figure.meets_bar is False for figure in figures))


def keep(name: str, figures: Sequence[Figure], folder: Path) -> Path:
    """Print figures that were measured here and now, and record them in folder/NAME.json. Returns the file."""
    width = max((len(figure.name) for figure in figures), default=0)
    for figure in figures:
        spread = f" ({figure.spread[0]:g} to {figure.spread[1]:g})" if figure.spread else ""
        bar = f"  {figure.verdict} ({figure.bar})" if figure.bar else ""
        print(f"{figure.name:{width}}  {figure.value:g} {figure.unit}{spread}{bar}", flush=True)
    run = Run(datetime.now(UTC).date().isoformat(), _commit(), Machine.here(), _versions(), tuple(figures))
    return add(name, run, folder)


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark. `description`: the module's docstring, for its help."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
