"""Times graphs in their runtime, for the passes that choose by measured times. Each graph is loaded in a process of its own."""

import contextlib
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np

from nightpress.core.compress.context import TimedIn
from nightpress.core.compress.export import onnx, openvino
from nightpress.core.compress.export.consumer import Consumer, timed_rounds
from nightpress.core.compress.export.task import Task, TimedShape
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.processor import cpu_features, processor

_EXPORTERS: dict[str, tuple[ModuleType, str]] = {"onnx": (onnx, "onnxruntime"), "openvino": (openvino, "openvino")}
_AT_ONCE = 6  #: processes beside that of the first graph, at most
_FEWEST = 2  #: processes in a group
_GROUP_BYTES = 1_000_000_000  #: no further graph joins a group whose graphs take more
_ROUNDS = 25
_ALIKE = 1.08  #: how many times as long as in the fastest group a graph may take in another
_AGAIN = 3  #: how often a group is timed again
_FIRST_TOKEN, _TOKENS = 5, 1000  #: the timed texts consist of these tokens: no padding, and in every cut token table


class GraphStopwatch:
    """Times ONNX graphs of a model. source: the model's folder, whose tokenizer and config belong to each artifact."""

    def __init__(self, source: Path, scratch: Path, threads: int) -> None:
        self._source, self._scratch, self._threads = source, scratch, threads

    def conditions(self, place: TimedIn) -> str:
        _, library = _EXPORTERS[place.runtime]
        features = ", ".join(cpu_features())
        return f"{library} {version(library)}, {processor()} ({features}), {self._threads} threads, {place.batch} × {place.length} tokens"

    def milliseconds(
        self, graphs: Sequence[Callable[[Path], None]], place: TimedIn, tell: Callable[[float], None]
    ) -> list[float]:
        """The time of each graph when nothing disturbs it. The first graph runs in every group of graphs: times are its time multiplied by ratios.

        The fastest run of a graph counts: what else the machine does only adds time. The graphs of a group run by turns, so a change of the
        processor's speed affects all alike. Groups that other work has disturbed are timed again. Graphs of a group alone lie on the disk and in
        memory. Raises NightpressError(verification_failed) if a graph does not run.
        """
        first, *others = graphs
        taken: list[list[float]] = []  #: of each group: the time of the first graph, and of the others
        while (done := _others(taken)) < len(others):
            taken.append(self._timed([first, *others[done : done + _AT_ONCE]], place))
            tell(_others(taken) / len(others))

        def time_again(group: int) -> list[float]:
            start = _others(taken[:group])
            tell(1.0)
            return self._timed([first, *others[start : start + len(taken[group]) - 1]], place)

        quiet = undisturbed(taken, time_again)
        base = statistics.median(times[0] for times in quiet)
        return [base, *(base * time / times[0] for times in quiet for time in times[1:])]

    def _timed(self, graphs: Sequence[Callable[[Path], None]], place: TimedIn) -> list[float]:
        """The fastest run of each graph, by turns; of fewer graphs if they are large."""
        with self._opened(graphs, place) as consumers:
            shape = TimedShape(place.batch, place.length, _ROUNDS)
            return [
                min(run["milliseconds"] for run in runs) for runs in timed_rounds(shape, consumers, lambda _share: None)
            ]

    @contextlib.contextmanager
    def _opened(self, graphs: Sequence[Callable[[Path], None]], place: TimedIn) -> Iterator[list[Consumer]]:
        """Load graphs in processes of their own: all of them, or as many as together stay below a size, at least two."""
        exporter, _ = _EXPORTERS[place.runtime]
        shutil.rmtree(self._scratch, ignore_errors=True)
        task = Task(
            name="embedding",
            model_class="AutoModel",
            sets=(),
            shapes=(TimedShape(place.batch, place.length, _ROUNDS),),
            timing_ids=_FIRST_TOKEN + np.arange(place.length) % _TOKENS,
            pooling="mean",
            classes=1,
            threads=self._threads,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self._scratch, ignore_errors=True)
            consumers: list[Consumer] = []
            written = 0
            for at, write in enumerate(graphs):
                if at >= _FEWEST and written > _GROUP_BYTES:
                    break
                plain, folder = self._scratch / "graph" / "model.onnx", self._scratch / str(at)
                plain.parent.mkdir(parents=True, exist_ok=True)
                write(plain)
                written += plain.stat().st_size
                exporter.save(self._source, folder, Traced(plain, np.zeros(0, np.float32), {}), [])
                opened = Consumer(
                    Path(exporter.CONSUMER), folder, task, name=f"timed-{at}", scratch=self._scratch / "processes"
                )
                consumers.append(stack.enter_context(opened))
            for consumer in consumers:
                consumer.run()
            yield consumers


def undisturbed(taken: Sequence[list[float]], time_again: Callable[[int], list[float]]) -> list[list[float]]:
    """Time groups again in which the first graph took longer than in others.

    taken: of each group, the time of the graph that all groups have, and of the others. Other work on the machine slows a graph that takes
    long more than one that ends between two interruptions: all ratios of such a group are too small. time_again: takes the number of a group.
    """
    found = list(taken)
    for _ in range(_AGAIN):
        limit = _ALIKE * min(times[0] for times in found)
        for group, times in enumerate(found):
            if times[0] > limit:
                found[group] = min(times, time_again(group), key=lambda times: times[0])
    return found


def _others(taken: Sequence[list[float]]) -> int:
    """The number of graphs in these groups, but for the first of each."""
    return sum(len(times) - 1 for times in taken)
