"""The table of `shape-to-speed`: how long an encoder's attention and feed-forward take at each width, in the runtime that will run the result.

Each entry is the time of a graph in which every layer has this width and lacks the other module, beside the graph without any module. So
weights fill the caches as in the whole model, and the runtime's start of a run is not counted for each module.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from nightpress.core.compress.context import PassContext, Stopwatch, TimedIn
from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.graph.modules import example_ids
from nightpress.core.compress.graph.narrowed import in_int8, narrowed
from nightpress.core.compress.graph.static_ranges import TOP
from nightpress.core.compress.graph.tracing import trace
from nightpress.core.compress.graph.unread import reads_some_positions
from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.passes.static_int8 import weight_bits
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.anatomy import Anatomy
from nightpress.core.recipes.passes import ShapeToSpeed, StaticInt8
from nightpress.core.recipes.passes.shape import FORMATS

Shape = tuple[tuple[int, ...], tuple[int, ...]]  #: groups of heads and channels of each layer
_NEAR = 2  #: neighbours on each side that a time is smoothed with
_COLUMNS = ("heads", "widths", "last_heads", "last_widths")


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one run."""

    conditions: str  #: processor, threads, runtime and shape
    type: str  #: number type of all graphs but the source's: `float` or `int8`
    source: float  #: the whole model in float
    whole: float  #: the whole model in `type`
    rest: float  #: the model without attention and feed-forward: embeddings, norms, head, and the start of a run
    heads: Mapping[int, float]  #: groups of heads → attention of one layer
    widths: Mapping[int, float]  #: channels → feed-forward of one layer
    last_heads: Mapping[
        int, float
    ]  #: the same for the last layer, which may compute only the positions that the answer reads
    last_widths: Mapping[int, float]

    def estimate(self, heads: Sequence[int], widths: Sequence[int]) -> float:
        """The milliseconds of a model whose layers have these groups of heads and channels."""
        inner = sum(self.heads[count] for count in heads[:-1]) + sum(self.widths[count] for count in widths[:-1])
        return self.rest + inner + self.last_heads[heads[-1]] + self.last_widths[widths[-1]]

    def speed(self, heads: Sequence[int], widths: Sequence[int]) -> float:
        """How many times as fast as the source in float that model is."""
        return self.source / self.estimate(heads, widths)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "LatencyTable":
        raw = json.loads(text)
        raw = {"last_heads": raw["heads"], "last_widths": raw["widths"]} | raw  # earlier versions: all layers alike
        counts = {name: {int(count): ms for count, ms in raw[name].items()} for name in _COLUMNS}
        return cls(**raw | counts)


def latency_table(source: Path, options: ShapeToSpeed, anatomy: Anatomy, context: PassContext) -> LatencyTable:
    """Measure the table, or find the one that an earlier attempt measured for the same shapes under the same conditions.

    Raises NightpressError(unsupported_architecture) if the model can't be traced, or its graph not narrowed.
    """
    if context.stopwatch is None:
        raise NightpressError(
            ErrorCode.INTERNAL,
            "`shape-to-speed` was run without a stopwatch, so that no times can be measured.",
            hint="Run it in a job, or call `shape_to_speed_with` with a table.",
        )
    place = TimedIn(FORMATS[options.runtime], options.batch, options.length)
    heads, widths = options.head_levels(anatomy), options.width_levels(anatomy)
    conditions = context.stopwatch.conditions(place)
    wanted = json.dumps([_COLUMNS, conditions, options.type, heads, widths, context.header.model_dump(mode="json")])
    file = context.work_dir / "shape" / f"table-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        times = _measured(source, options, anatomy, context, context.stopwatch, place)
        write_file(file, table_of(conditions, options.type, anatomy.layers, times).to_json().encode())
        context.whole(1, file)
    return LatencyTable.from_json(file.read_text())


#: (column, count), (`source`, 0), (`whole`, 0) or (`rest`, 0) → milliseconds of a graph
Times = Mapping[tuple[str, int], float]


def table_of(conditions: str, type_: str, layers: int, times: Times) -> LatencyTable:
    """Make the table from the times of the graphs.

    A time is that of its neighbours, too: the shapes are chosen by these times, and the choice would go by what is fast by chance. A module
    that is wider never counts as faster. If the whole modules of the last layer were timed alone, their narrower forms take as much
    less as they are narrower: they are small. All modules' times are multiplied by one factor, so that the estimate of the whole model is its
    measured time: beside each other, modules take longer or less long than alone.
    """
    rest, whole = times["rest", 0], times["whole", 0]
    columns: dict[str, dict[int, float]] = {}
    for kind in ("heads", "widths"):
        counts = sorted(count for name, count in times if name == kind)
        last = {
            count: count / counts[-1] * max(0.0, alone - rest)
            for count in counts
            if (alone := times.get((f"last_{kind}", counts[-1]))) is not None
        }
        each = [
            max(0.0, (times[kind, count] - rest - last.get(count, 0.0)) / (layers - bool(last))) for count in counts
        ]
        columns[kind] = {0: 0.0, **dict(zip(counts, _smooth(counts, each), strict=True))}
        columns[f"last_{kind}"] = {0: 0.0, **last} if last else columns[kind]
    dense = sum(
        (1 if name.startswith("last") else layers - 1) * max(column.values()) for name, column in columns.items()
    )
    factor = max(0.0, whole - rest) / dense if dense else 1.0
    scaled = {name: {count: factor * ms for count, ms in column.items()} for name, column in columns.items()}
    return LatencyTable(conditions, type_, times["source", 0], whole, rest, **scaled)


def _smooth(counts: Sequence[int], times: Sequence[float]) -> list[float]:
    """The value at each count of the straight line through it and two neighbours on each side, or that of a smaller count if it is larger."""
    near = [slice(max(0, at - _NEAR), at + _NEAR + 1) for at in range(len(counts))]
    lines = [np.polynomial.Polynomial.fit(counts[part], times[part], min(1, len(counts) - 1)) for part in near]
    values = (max(0.0, float(line(count))) for line, count in zip(lines, counts, strict=True))
    return list(accumulate(values, max))


def _measured(
    source: Path,
    options: ShapeToSpeed,
    anatomy: Anatomy,
    context: PassContext,
    stopwatch: Stopwatch,
    place: TimedIn,
) -> dict[tuple[str, int], float]:
    ids = example_ids(context.header).numpy()
    traced = trace(source, context.header, Sequences(ids, np.ones_like(ids)), context).path
    most, layers = (max(anatomy.groups), max(anatomy.widths)), anatomy.layers

    def everywhere(heads: int, width: int) -> Shape:
        return (heads,) * layers, (width,) * layers

    heads = {("heads", count): everywhere(count, 0) for count in options.head_levels(anatomy) if count}
    widths = {("widths", count): everywhere(0, count) for count in options.width_levels(anatomy) if count}
    shapes: dict[tuple[str, int], Shape] = {
        ("whole", 0): everywhere(*most),
        ("rest", 0): everywhere(0, 0),
        **heads,
        **widths,
    }
    if layers > 1 and reads_some_positions(traced):
        none = (0,) * layers
        shapes["last_heads", most[0]] = (*none[1:], most[0]), none
        shapes["last_widths", most[1]] = none, (*none[1:], most[1])

    def write(shape: Shape, file: Path, *, int8: bool, unread: bool = False) -> None:
        with disk_errors():
            file.write_bytes(narrowed(traced, anatomy, *shape, unread=unread).SerializeToString())
            if int8 and any(map(any, shape)):  # the rest has no product that int8 makes faster
                file.write_bytes(in_int8(file, StaticInt8(), TOP[weight_bits(StaticInt8())]))

    def tell(share: float) -> None:
        context.progress(0.1 + 0.9 * share, f"timing {len(shapes) + 1} graphs in {options.runtime}, {share:.0%}")

    writers = [partial(write, shape, int8=options.type == "int8") for shape in shapes.values()]
    found = stopwatch.milliseconds([partial(write, everywhere(*most), int8=False, unread=True), *writers], place, tell)
    return dict(zip((("source", 0), *shapes), found, strict=True))
