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
        processor's speed affects all alike. Graphs of a group alone lie on the disk and in memory. Raises
        NightpressError(verification_failed) if a graph does not run.
        """
        first, *others = graphs
        firsts: list[float] = []
        ratios: list[float] = []
        while len(ratios) < len(others):
            with self._opened([first, *others[len(ratios) : len(ratios) + _AT_ONCE]], place) as consumers:
                shape = TimedShape(place.batch, place.length, _ROUNDS)
                runs = [[run["milliseconds"] for run in found] for found in timed_rounds(shape, consumers, _untold)]
            fast, *rest = map(min, runs)
            firsts.append(fast)
            ratios += [time / fast for time in rest]
            tell(len(ratios) / len(others))
        base = statistics.median(firsts)
        return [base, *(base * ratio for ratio in ratios)]

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


def _untold(_share: float) -> None:
    """A group of graphs is timed in seconds."""
