"""Static int8 on a graph: ranges come from calibration, and layers with large errors stay in float until the outputs are close enough.

A quantized product reads `DequantizeLinear(QuantizeLinear(x))` and `DequantizeLinear(int8 weight)` (QDQ). ONNX Runtime and OpenVINO turn
these into int8 kernels when they load the graph. A product left in float still has int8 weights: ONNX Runtime dequantizes them when it
loads the graph, and OpenVINO quantizes the product's inputs in groups at run time.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.graph.static_ranges import Texts, calibrated, session
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.model.cosines import row_cosines
from nightpress.core.compress.passes.registry import graph_pass
from nightpress.core.compress.passes.within import Candidate, Search, bisect
from nightpress.core.compress.runners.measure import pool
from nightpress.core.handoff.report import PassRecord, Within
from nightpress.core.processor import cpu_features
from nightpress.core.recipes.costs import TRIAL_TOKENS
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes import StaticInt8

GRAPH_FILE = "model.onnx"
_NUMBER = re.compile(r"\d+")  #: layers whose names differ only in numbers are of the same kind
_TRIAL_LENGTH = 128  #: tokens of each held-out text
#: Kinds of layers are ranked on 1 / 4 of the held-out texts; of a classifier on all of them, because each text has few outputs.
_RANKED_SHARE = 4
#: Share of the layers that stay in float if no number of them reaches `min_cosine`: the graph is still faster than the float graph.
_MOST_IN_FLOAT = 1 / 2


@graph_pass(StaticInt8)
def static_int8(
    model_dir: Path, traced: Traced, options: StaticInt8, context: PassContext
) -> tuple[Traced, PassRecord]:
    """Return the traced graph with its linear layers in int8. Ranges and result are checkpoints: the next attempt of the job reuses them.

    Raises NightpressError: invalid_recipe if nothing is left to quantize, and numerical_failure if a layer's inputs are not finite.
    """
    start = time.monotonic()
    bits = weight_bits(options)
    wanted = f"{traced.path.parent.name}\n{options.model_dump_json()}\n{context.calibration.model_dump_json()}\n{bits}"
    folder = context.work_dir / "static" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    graph, report = folder / GRAPH_FILE, folder / "record.json"
    if not report.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        seen, held = _texts(model_dir, context)
        plan, ranges, costs = calibrated(traced.path, seen, options, bits, folder, context)
        fidelity = _GraphFidelity(traced.path, held, context)

        def score(left: Collection[str], texts: int | None = None) -> float:
            return fidelity.cosine(plan.written(ranges, left), texts)

        share = 1 if context.header.task == "classification" else _RANKED_SHARE
        order = _Order(costs, plan.work(_TRIAL_LENGTH), score, max(1, len(held.ids) // share), context)
        found: Within | None = None
        warnings: tuple[str, ...] = ()
        if options.within is None:
            left, cosine = _reaching(options.min_cosine, order, score, context)
        else:
            left, found, warnings = _within(order, lambda left: plan.written(ranges, left), options, folder, context)
            cosine = score(left)
        with disk_errors():
            partial = folder / "partial.onnx"
            partial.write_bytes(plan.written(ranges, left))
            partial.replace(graph)
        record = PassRecord(
            index=context.index,
            name=options.name,
            seconds=time.monotonic() - start,
            summary={
                "ranges": options.ranges,
                "weight_bits": bits,
                "calibration_tokens": int(seen.mask.sum()),
                "matrices": len(set(plan.inputs) - left),
                "attention_scores": len(set(plan.scores) - left),
                "left_in_float": sorted(left),
                "cosine_held_apart": round(cosine, 6),
                "min_cosine_held": options.min_cosine is None or cosine >= options.min_cosine,
                "cosine_gained_by_kind": order.gained,
            },
            layers=plan.effects(left),
            within=found,
            warnings=warnings,
        )
        write_file(report, record.model_dump_json().encode())
        context.whole(2, graph, report)
    return replace(traced, path=graph), PassRecord.model_validate_json(report.read_bytes())


def weight_bits(options: StaticInt8) -> int:
    if options.weight_bits != "auto":
        return options.weight_bits
    have = set(cpu_features())
    return 7 if "avx2" in have and not have & {"avx_vnni", "avx512_vnni", "amx_int8"} else 8


def _texts(model_dir: Path, context: PassContext) -> tuple[Texts, Texts]:
    """Return (texts for calibration, held-out texts for comparing the graphs)."""
    samples = calibration_samples(model_dir, context)
    ids = samples["input_ids"].numpy()
    mask, types = (samples.get(name) for name in ("attention_mask", "token_type_ids"))
    texts = Texts(
        ids,
        np.ones_like(ids) if mask is None else mask.numpy(),
        np.zeros_like(ids) if types is None else types.numpy(),
    )
    if len(ids) < 2:
        raise invalid(
            "`static-int8` needs two calibration texts: one to find ranges on, one to judge them on.",
            "Raise `samples`.",
        )
    held = min(TRIAL_TOKENS // _TRIAL_LENGTH, max(1, len(ids) // 4))
    return texts[: len(ids) - held], texts[len(ids) - held :].cut(_TRIAL_LENGTH)


class _GraphFidelity:
    """Compares a quantized graph's outputs on the held-out texts with the float graph's."""

    def __init__(self, graph: Path, texts: Texts, context: PassContext) -> None:
        self._texts, self._context = texts, context
        self._pooling = context.header.pooling if context.header.task == "embedding" else None
        self._expected = list(self._answers(graph, texts))

    def cosine(self, graph: bytes, texts: int | None = None) -> float:
        """Return the cosine of both graphs' outputs: for an embedder the mean over pooled vectors, else that of all logits as one vector.

        texts: number of held-out texts to use; None: all.
        """
        held = self._texts[:texts] if texts else self._texts
        pairs = zip(self._answers(graph, held), self._expected[: len(held.ids)], strict=True)
        if self._pooling:
            return float(np.mean([row_cosines(ours, theirs)[0] for ours, theirs in pairs]))
        product, ours_squared, theirs_squared = 0.0, 0.0, 0.0
        for ours, theirs in pairs:
            a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
            product += float(a @ b)
            ours_squared += float(a @ a)
            theirs_squared += float(b @ b)
        return float(product / max((ours_squared * theirs_squared) ** 0.5, 1e-30))

    def _answers(self, graph: bytes | Path, texts: Texts) -> Iterator[NDArray[np.float32]]:
        """Yield a graph's output for one text at a time, because the logits of a masked language model are large."""
        loaded = session(graph, self._context.threads)
        inputs = {value.name for value in loaded.get_inputs()}
        for at, feeds in enumerate(texts.feeds(inputs, tokens=1)):
            self._context.progress(0.6, f"answering texts held apart, {at + 1} of {len(texts.ids)}")
            out = loaded.run(None, feeds)[0]
            if self._pooling:
                out = pool(out, feeds["attention_mask"], self._pooling)
            elif out.ndim == 3:
                out = out * feeds["attention_mask"][:, :, None].astype(np.float32)
            yield out


class _Order:
    """The layers in the order in which they go back to float: those first that cost most for the time that int8 saves.

    score(layers in float, number of texts) → cosine. costs: layer → its own rounding error. work: layer → its multiply-adds. For each *kind*
    of layer, a graph with that kind in float measures how much cosine it gains, and the layers of the kind share this gain in proportion to
    `costs`. So the number of graphs grows with the number of kinds. They are measured when the order is needed first.
    """

    def __init__(
        self,
        costs: Mapping[str, float],
        work: Mapping[str, int],
        score: Callable[..., float],
        texts: int,
        context: PassContext,
    ) -> None:
        """texts: number of held-out texts to rank the kinds on."""
        self._costs, self._work, self._score, self._texts, self._context = costs, work, score, texts, context
        self._layers: list[str] | None = None
        self.gained: dict[str, float] = {}  #: kind of layer → the cosine that it gains in float; empty: not needed

    def __len__(self) -> int:
        return len(self._costs)

    def first(self, count: int) -> frozenset[str]:
        """The layers that stay in float if `count` do."""
        if not count:
            return frozenset()
        if self._layers is None:
            self._layers = self._measure()
        return frozenset(self._layers[:count])

    def _measure(self) -> list[str]:
        costs, part = self._costs, self._texts
        kinds: dict[str, list[str]] = {}
        for name in costs:
            kinds.setdefault(_NUMBER.sub("#", name), []).append(name)
        all_in_int8 = self._score((), part)
        expected: dict[str, float] = {}
        for at, (kind, names) in enumerate(kinds.items()):
            what = f"weighing layers of a kind, {at + 1} of {len(kinds)}: {kind}"
            self._context.progress(0.65 + 0.15 * at / len(kinds), what)
            gained = max(self._score(names, part) - all_in_int8, 0.0)
            self.gained[kind] = round(gained, 8)
            together = sum(costs[name] for name in names) or 1.0
            expected |= {name: gained * costs[name] / together / self._work[name] for name in names}
        return sorted(costs, key=lambda name: (-expected[name], -costs[name], name))


def _reaching(
    least: float | None, order: _Order, score: Callable[..., float], context: PassContext
) -> tuple[frozenset[str], float]:
    """Return the layers to leave in float so that the cosine reaches `least`, as few as possible, and that cosine.

    If no number of layers reaches it, half of the layers stay in float.
    """
    found: dict[int, float] = {}

    def tried(count: int) -> float:
        if count not in found:
            what = f"judging the graph with {count} of {len(order)} layers in float"
            context.progress(0.8 + 0.015 * len(found) if found else 0.6, what)
            found[count] = score(order.first(count))
        return found[count]

    if least is None:
        return frozenset(), tried(0)
    count, reached = bisect(max(0, len(order) - 1), lambda count: tried(count) >= least, first=0)
    count = count if reached else max(1, int(len(order) * _MOST_IN_FLOAT))
    return order.first(count), tried(count)


def _within(
    order: _Order,
    written: Callable[[frozenset[str]], bytes],
    options: StaticInt8,
    folder: Path,
    context: PassContext,
) -> tuple[frozenset[str], Within, tuple[str, ...]]:
    """Return the layers to leave in float so that the gate is kept, as few as possible, the report of the search, and its warnings.

    If no number of layers keeps it, they are those of the graph that came nearest.
    """
    steps = [f"{count} of {len(order)} layers in float" for count in range(max(1, len(order)))]
    search = Search(options, steps, context, folder / "within.json")
    tried = folder / "tried"

    def make(count: int) -> Candidate:
        context.progress(0.6 if not count else 0.8 + 0.2 * search.span()[0], f"measuring {steps[count]}")
        tried.mkdir(exist_ok=True)
        with disk_errors():
            size = (tried / GRAPH_FILE).write_bytes(written(order.first(count)))
        return Candidate(size, search.judge.graph(tried))

    count, kept = search.run(make, first=0)
    shutil.rmtree(tried, ignore_errors=True)
    return order.first(count), search.outcome(count, kept=kept), search.warnings(kept=kept)
