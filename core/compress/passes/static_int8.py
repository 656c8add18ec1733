"""Static int8 on a graph: ranges from calibration, layers that cost most left in float until the answers are near enough.

A quantized product reads `DequantizeLinear(QuantizeLinear(x))` and `DequantizeLinear(int8 weight)` (QDQ), which ONNX Runtime and OpenVINO
turn into int8 kernels as they load. One left in float has its weights in int8 all the same: ONNX Runtime multiplies them out as it loads,
OpenVINO rounds their inputs in groups as they come.
"""

import hashlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.calibration import calibration_samples
from nightpress.core.compress.environment import cpu_features
from nightpress.core.compress.graph.static_ranges import Texts, calibrated, session
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.model.cosines import row_cosines
from nightpress.core.compress.passes.registry import graph_pass
from nightpress.core.compress.runners.measure import pool
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.costs import TRIAL_TOKENS
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes import StaticInt8

GRAPH_FILE = "model.onnx"
_NUMBER = re.compile(r"\d+")  #: layers whose names differ in numbers alone are of a kind
_TRIAL_LENGTH = 128  #: tokens of a text held apart
_RANKED_SHARE = 4  #: layers of a kind are judged on this part of them
#: Of the layers, that stay in float where no number of them holds the budget: the graph is still faster than the float graph.
_MOST_IN_FLOAT = 1 / 2


@graph_pass(StaticInt8)
def static_int8(
    model_dir: Path, traced: Traced, options: StaticInt8, context: PassContext
) -> tuple[Traced, PassRecord]:
    """The traced graph with its linear layers in int8. Another attempt of the same job finds ranges and result in its work folder.

    Raises NightpressError: invalid_recipe if nothing is left to quantize, and numerical_failure if what a layer is given is not finite.
    """
    start = time.monotonic()
    bits = _weight_bits(options)
    wanted = f"{traced.path.parent.name}\n{options.model_dump_json()}\n{context.calibration.model_dump_json()}\n{bits}"
    folder = context.work_dir / "static" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    graph, report = folder / GRAPH_FILE, folder / "record.json"
    if not report.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        seen, held = _texts(model_dir, context)
        plan, ranges, costs = calibrated(traced.path, seen, options, bits, folder, context)
        judge = _GraphFidelity(traced.path, held, context)

        def score(left: Collection[str], texts: int | None = None) -> float:
            return judge.cosine(plan.written(ranges, left), texts)

        left, cosine = _left_in_float(costs, score, options.min_cosine, len(held.ids), context)
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
            },
            layers=plan.effects(left),
        )
        write_file(report, record.model_dump_json().encode())
        context.whole(2, graph, report)
    return replace(traced, path=graph), PassRecord.model_validate_json(report.read_bytes())


def _weight_bits(options: StaticInt8) -> int:
    if options.weight_bits != "auto":
        return options.weight_bits
    have = set(cpu_features())
    return 7 if "avx2" in have and not have & {"avx_vnni", "avx512_vnni", "amx_int8"} else 8


def _texts(model_dir: Path, context: PassContext) -> tuple[Texts, Texts]:
    """(to find ranges on, held apart to judge the graph on)."""
    samples = calibration_samples(model_dir, context)
    ids = samples["input_ids"].numpy()
    texts = Texts(ids, samples["attention_mask"].numpy() if "attention_mask" in samples else np.ones_like(ids))
    if len(ids) < 2:
        raise invalid(
            "`static-int8` needs two calibration texts: one to find ranges on, one to judge them on.",
            "Raise `samples`.",
        )
    held = min(TRIAL_TOKENS // _TRIAL_LENGTH, max(1, len(ids) // 4))
    return texts[: len(ids) - held], texts[len(ids) - held :].cut(_TRIAL_LENGTH)


class _GraphFidelity:
    """How near a quantized graph's answers to the held texts are to the float graph's."""

    def __init__(self, graph: Path, texts: Texts, context: PassContext) -> None:
        self._texts, self._context = texts, context
        self._pooling = context.header.pooling if context.header.task == "embedding" else None
        self._expected = list(self._answers(graph, texts))

    def cosine(self, graph: bytes, texts: int | None = None) -> float:
        """Mean over texts of pooled vectors' cosines for an embedder; of all logits as one vector for others."""
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
        """A text at a time: the logits of a masked language model are wide."""
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


def _left_in_float(
    costs: Mapping[str, float],
    score: Callable[..., float],
    least: float | None,
    texts: int,
    context: PassContext,
) -> tuple[frozenset[str], float]:
    """The fewest of the worst layers without which the cosine reaches `least`, and that cosine; half of them where none does.

    score(layers left in float, number of texts) → cosine. How much of what is lost each *kind* of layer loses is measured, a graph a
    kind; within a kind, layers share it as their own `costs` say. How many of them stay in float is found by bisection. So the number of
    graphs grows with the logarithm of the number of layers.
    """
    context.progress(0.6, "judging the graph with all layers in int8")
    cosine = score(())
    if least is None or cosine >= least:
        return frozenset(), cosine
    part = max(1, texts // _RANKED_SHARE)
    kinds: dict[str, list[str]] = {}
    for name in costs:
        kinds.setdefault(_NUMBER.sub("#", name), []).append(name)
    all_in_int8 = score((), part)
    expected: dict[str, float] = {}
    for at, (kind, names) in enumerate(kinds.items()):
        context.progress(0.65 + 0.15 * at / len(kinds), f"weighing layers of a kind, {at + 1} of {len(kinds)}: {kind}")
        gained = max(score(names, part) - all_in_int8, 0.0)
        together = sum(costs[name] for name in names) or 1.0
        expected |= {name: gained * costs[name] / together for name in names}
    order = sorted(costs, key=lambda name: (-expected[name], -costs[name], name))

    def tried(count: int) -> float:
        context.progress(0.8 + 0.015 * len(found), f"judging the graph with {count} of {len(order)} layers in float")
        found[count] = score(order[:count])
        return found[count]

    found: dict[int, float] = {}
    few, many = 1, len(order) - 1
    if many < 1 or tried(many) < least:
        half = max(1, int(len(order) * _MOST_IN_FLOAT))
        return frozenset(order[:half]), tried(half)
    while few < many:
        middle = (few + many) // 2
        few, many = (few, middle) if tried(middle) >= least else (middle + 1, many)
    return frozenset(order[:many]), found[many]
