"""Times graphs in their runtime, for the passes that choose by measured times. Each graph is loaded in a process of its own."""

import contextlib
import shutil
import statistics
from collections.abc import Callable, Sequence
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
_AT_ONCE = 6  #: processes beside that of the first graph
_ROUNDS = 15
_FIRST_TOKEN, _TOKENS = 5, 1000  #: the timed texts consist of these tokens: no padding, and in every cut token table


class GraphStopwatch:
    """Times ONNX graphs of a model. source: the model's folder, whose tokenizer and config belong to each artifact."""

    def __init__(self, source: Path, scratch: Path, threads: int) -> None:
        self._source, self._scratch, self._threads = source, scratch, threads

    def conditions(self, place: TimedIn) -> str:
        _, library = _EXPORTERS[place.runtime]
        features = ", ".join(cpu_features())
        return f"{library} {version(library)}, {processor()} ({features}), {self._threads} threads, {place.batch} × {place.length} tokens"

    def milliseconds(self, graphs: Sequence[Path], place: TimedIn, tell: Callable[[float], None]) -> list[float]:
        """The median time of each graph. The first graph runs in every group of graphs: times are its time multiplied by ratios within rounds.

        So what else the machine does in the meantime affects all alike. Raises NightpressError(verification_failed) if a graph does not run.
        """
        first, *others = graphs
        firsts: list[float] = []
        ratios: list[float] = []
        for start in range(0, max(1, len(others)), _AT_ONCE):
            group = others[start : start + _AT_ONCE]
            runs = self._rounds([first, *group], place)
            firsts += runs[0]
            ratios += [
                statistics.median(ours / base for ours, base in zip(times, runs[0], strict=True)) for times in runs[1:]
            ]
            tell(min(1.0, (start + len(group)) / max(1, len(others))))
        base = statistics.median(firsts)
        return [base, *(base * ratio for ratio in ratios)]

    def _rounds(self, graphs: Sequence[Path], place: TimedIn) -> list[list[float]]:
        """The milliseconds of each graph in each round."""
        exporter, _ = _EXPORTERS[place.runtime]
        shutil.rmtree(self._scratch, ignore_errors=True)
        shape = TimedShape(place.batch, place.length, _ROUNDS)
        task = Task(
            name="embedding",
            sets=(),
            shapes=(shape,),
            timing_ids=_FIRST_TOKEN + np.arange(place.length) % _TOKENS,
            pooling="mean",
            classes=1,
            threads=self._threads,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self._scratch, ignore_errors=True)
            consumers = []
            for at, graph in enumerate(graphs):
                folder = self._scratch / str(at)
                folder.parent.mkdir(parents=True, exist_ok=True)
                exporter.save(self._source, folder, Traced(graph, np.zeros(0, np.float32), {}), [])
                opened = Consumer(
                    Path(exporter.CONSUMER), folder, task, name=f"timed-{at}", scratch=self._scratch / "processes"
                )
                consumers.append(stack.enter_context(opened))
            for consumer in consumers:
                consumer.run()
            found = timed_rounds(shape, consumers, lambda _share: None)
        return [[run["milliseconds"] for run in runs] for runs in found]
