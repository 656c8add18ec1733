"""The context of a pass: its inputs other than the folders and the options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.handoff.report import GateResult
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import ModelHeader


def _no_progress(_fraction: float, _message: str) -> None:
    pass


def _no_metric(_name: str, _value: float, _step: int) -> None:
    pass


def _no_checkpoint(_path: str, _step: int) -> None:
    pass


@dataclass(frozen=True)
class Judged:
    """A gate decided for a candidate."""

    by_end: GateResult  #: by the unfavourable end of the figure's interval: this decides
    by_value: GateResult  #: by the figure itself


class Judge(Protocol):
    """Measures candidates on the half of the evaluation's data that chooses, and decides the gate of the pass's `within`."""

    @property
    def gate(self) -> str:
        """The gate as it is decided, e.g. `accuracy >= -1%`."""

    @property
    def data(self) -> tuple[str, ...]:
        """The data sets that measure it."""

    @property
    def examples(self) -> int:
        """The number of examples in the smallest of them."""

    @property
    def note(self) -> str:
        """What stands in for the gate's figure, and why; empty: nothing."""

    def model(self, folder: Path) -> Judged:
        """Decide the gate for a model's folder."""

    def graph(self, folder: Path) -> Judged:
        """Decide the gate for the folder of an ONNX graph."""


@dataclass(frozen=True)
class TimedIn:
    """Where and how graphs are timed."""

    runtime: str  #: `onnx` or `openvino`
    batch: int
    length: int  #: tokens of each text


class Stopwatch(Protocol):
    """Times graphs in the runtime that will run the result, each in a process of its own."""

    def conditions(self, place: TimedIn) -> str:
        """Everything beside the graphs that the times depend on: processor, threads, the runtime's version, and the shape."""

    def milliseconds(
        self, graphs: Sequence[Callable[[Path], None]], place: TimedIn, tell: Callable[[float], None]
    ) -> list[float]:
        """The median time of a run of each graph, taken by turns. Each of `graphs` writes an ONNX graph to a path; the first is the largest.

        tell: gets the share that is done.
        """


@dataclass(frozen=True)
class PassContext:
    header: ModelHeader  #: of the model that the pass reads
    work_dir: Path  #: kept between the attempts of a job, so that an attempt finds finished shards there
    origin: Path | None = None  #: the job's source model; None: the model that the pass reads
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    index: int = 0  #: of the pass in the recipe, from 0
    calibration: Calibration = field(default=Calibration())  #: the text that the pass may read
    #: Files of registered data sets, by their names in the recipe.
    data_files: Mapping[str, Path] = field(default_factory=dict)
    #: Measures candidates, for a pass that searches within a gate; None: the pass does not.
    judge: Judge | None = None
    #: The processes that share out the pass's work, for `over_ranks`; None: there is this one alone.
    ranks: Ranks | None = None
    group: Group = ALONE  #: in such a process: the others
    #: Times graphs, for a pass that chooses by measured times; None: there is no runtime at hand.
    stopwatch: Stopwatch | None = None
    progress: Callable[[float, str], None] = field(default=_no_progress)  #: (fraction of this pass, what it does now)
    #: (name, value, step): adds a point to a curve.
    metric: Callable[[str, float, int], None] = field(default=_no_metric)
    #: (path below work_dir, step): reports a complete file, which a later attempt will find there. The same path replaces the file.
    checkpoint: Callable[[str, int], None] = field(default=_no_checkpoint)

    def part(self, start: float, end: float, doing: str = "") -> "PassContext":
        """Return the context of a part of the pass. start, end: fractions of the pass. doing: stands before the part's messages."""

        def progress(fraction: float, message: str) -> None:
            self.progress(start + (end - start) * fraction, doing + message)

        return replace(self, progress=progress)

    def whole(self, step: int, *files: Path) -> None:
        """Checkpoint files that belong together. Name the record that marks the others as complete last.

        Files outside work_dir are skipped: they belong to the caller.
        """
        for file in files:
            if file.is_relative_to(self.work_dir):
                self.checkpoint(file.relative_to(self.work_dir).as_posix(), step)


def over_ranks(function: Callable[..., Any], *args: Any, samples: int, context: PassContext) -> Any:
    """Call function(*args, context=…) in all processes of `context.ranks`. Returns the first process's result.

    samples: the number of samples that they share out. It is called here if there are no other processes, or fewer samples than those.

    The function's context has a `group` then, and only the first process's progress, metrics and checkpoints are passed on. function and
    args must be picklable. Raises what the function raises, and what `Ranks.run` does.
    """
    ranks = context.ranks
    if ranks is None or samples < ranks.size:
        return function(*args, context=replace(context, ranks=None))

    def told(name: str, given: tuple[Any, ...]) -> None:
        functions: dict[str, Callable[..., None]] = {
            "progress": context.progress,
            "metric": context.metric,
            "checkpoint": context.checkpoint,
        }
        functions[name](*given)

    bare = replace(
        context,
        judge=None,
        stopwatch=None,
        ranks=None,
        threads=ranks.threads,
        progress=_no_progress,
        metric=_no_metric,
        checkpoint=_no_checkpoint,
    )
    return ranks.run(_in_rank, function, args, bare, told=told)


def _in_rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    context: PassContext,
    *,
    group: Group,
    tell: Callable[..., None],
) -> Any:
    told: dict[str, Any] = {name: partial(tell, name) for name in ("progress", "metric", "checkpoint")}
    return function(*args, context=replace(context, group=group, **told))
