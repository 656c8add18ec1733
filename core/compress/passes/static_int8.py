"""Static int8 on a graph: ranges from calibration, layers that cost most left in float until the answers are near enough.

A quantized product reads `DequantizeLinear(QuantizeLinear(x))` and `DequantizeLinear(int8 weight)` (QDQ), which ONNX Runtime and OpenVINO
turn into int8 kernels as they load.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.compress.checkpoint import disk_errors, write_file
from core.compress.context import PassContext
from core.compress.environment import cpu_features
from core.compress.evaluate.calibration import calibration_samples
from core.compress.evaluate.fidelity import row_cosines
from core.compress.evaluate.quality import pooling_of
from core.compress.executors.graph import Traced
from core.compress.passes.quantize_graph import (
    array_of,
    codes_of,
    effect_of,
    fold_transposes,
    quantize_embeddings,
    something,
)
from core.compress.solvers import activation_ranges
from core.compress.solvers.activation_ranges import Histogram, Range
from core.errors import ErrorCode, NightpressError
from core.handoff.report import LayerEffect, PassRecord
from core.recipes.costs import GRAPH_TOKENS, TRIAL_TOKENS
from core.recipes.linears import invalid, matches
from core.recipes.passes import StaticInt8

GRAPH_FILE = "model.onnx"
_TRIAL_LENGTH = 128  #: tokens of a text held apart
_RANKED_SHARE = 4  #: a single layer is judged on this part of them
#: Largest code of a weight: 255 · 64 · 2 still fits the 16-bit sums of x86 without VNNI, 255 · 127 · 2 doesn't.
_TOP = {7: 64, 8: 127}

Ids = NDArray[np.int64]
Feeds = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    ids: Ids  #: [N, S]
    mask: Ids  #: [N, S]

    def feeds(self, inputs: Collection[str], tokens: int) -> Iterator[Feeds]:
        """What a graph is called with, about so many tokens at a time and at least one text."""
        rows = max(1, tokens // self.ids.shape[1])
        for at in range(0, len(self.ids), rows):
            ids, mask = self.ids[at : at + rows], self.mask[at : at + rows]
            found = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            yield {name: value for name, value in found.items() if name in inputs}

    def __getitem__(self, rows: slice) -> "Texts":
        return Texts(self.ids[rows], self.mask[rows])

    def cut(self, length: int) -> "Texts":
        return Texts(self.ids[:, :length], self.mask[:, :length])


def static_int8(
    model_dir: Path, traced: Traced, options: StaticInt8, context: PassContext
) -> tuple[Traced, PassRecord]:
    """The traced graph with its linear layers in int8. Another attempt of the same job finds ranges and result in its work folder.

    Raises NightpressError: invalid_recipe if nothing is left to quantize, or if the budget can't be held with any layer in int8.
    """
    start = time.monotonic()
    bits = _weight_bits(options)
    wanted = f"{traced.path.parent.name}\n{options.model_dump_json()}\n{context.calibration.model_dump_json()}\n{bits}"
    folder = context.work_dir / "static" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    graph, report = folder / GRAPH_FILE, folder / "record.json"
    if not report.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        seen, held = _texts(model_dir, context)
        plan = _Plan.of(traced.path, options, _TOP[bits])
        ranges = _ranges_of(plan, seen, options, folder, context)
        judge = _Judge(traced.path, model_dir, held, context)

        def score(left: Collection[str], texts: int | None = None) -> float:
            return judge.cosine(plan.written(ranges, left), texts)

        left, cosine = _left_in_float(plan.names, score, options.min_cosine, len(held.ids), context)
        with disk_errors():
            partial = folder / "partial.onnx"
            partial.write_bytes(plan.written(ranges, left))
            partial.replace(graph)
        record = PassRecord(
            index=context.index,
            name=options.pass_,
            seconds=time.monotonic() - start,
            summary={
                "ranges": options.ranges,
                "weight_bits": bits,
                "calibration_tokens": int(seen.mask.sum()),
                "matrices": len(plan.names) - len(left),
                "left_in_float": sorted(left),
                "cosine_held_apart": round(cosine, 6),
            },
            layers=tuple(effect for effect in plan.effects if effect.name not in left),
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


# The graph ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A graph with its embeddings in int8, and the products that may follow."""

    model: Any  #: onnx.ModelProto
    inputs: Mapping[str, str]  #: product → the tensor it is given
    codes: Mapping[str, tuple[NDArray[np.int8], NDArray[np.float32]]]  #: weight → codes [in, out] and scales [out]
    effects: tuple[LayerEffect, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @classmethod
    def of(cls, graph: Path, options: StaticInt8, top: int) -> "_Plan":
        import onnx

        model = onnx.load(graph)
        fold_transposes(onnx, model)
        constants = {one.name: one for one in model.graph.initializer}
        inputs, codes, effects = {}, {}, []
        for node in model.graph.node:
            if node.op_type != "MatMul" or node.input[1] not in constants or node.input[0] in constants:
                continue
            if matches(node.name, options.ignore) or matches(node.input[1], options.ignore):
                continue
            weight = array_of(onnx, constants[node.input[1]])
            if weight.ndim != 2:
                continue
            rounded, scales = codes_of(weight, 0, top)
            inputs[node.name], codes[node.input[1]] = node.input[0], (rounded, scales[0])
            effects.append(effect_of(node.name, weight, rounded * scales))
        something(effects, options.pass_)
        effects += quantize_embeddings(onnx, model, constants, options.ignore)
        return cls(model, inputs, codes, tuple(effects))

    def written(self, ranges: Mapping[str, Range], left: Collection[str]) -> bytes:
        """The graph with all products in int8 but those that are left in float."""
        import onnx

        helper, numpy_helper = onnx.helper, onnx.numpy_helper
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        nodes, constants, made = [], [], set()
        for node in model.graph.node:
            if node.name not in self.inputs or node.name in left:
                nodes.append(node)
                continue
            x, weight = node.input
            if x not in made:  # queries, keys and values are given the same codes
                made.add(x)
                scale, zero = activation_ranges.scale_and_zero(ranges[x])
                constants += [
                    numpy_helper.from_array(np.asarray(scale), f"{x}_scale"),
                    numpy_helper.from_array(np.asarray(zero), f"{x}_zero"),
                ]
                grid = [f"{x}_scale", f"{x}_zero"]
                nodes.append(helper.make_node("QuantizeLinear", [x, *grid], [f"{x}_uint8"], f"{x}_quantize"))
                nodes.append(
                    helper.make_node("DequantizeLinear", [f"{x}_uint8", *grid], [f"{x}_seen"], f"{x}_dequantize")
                )
            if weight not in made:
                made.add(weight)
                codes, scales = self.codes[weight]
                constants += [
                    numpy_helper.from_array(codes, f"{weight}_int8"),
                    numpy_helper.from_array(scales, f"{weight}_scales"),
                    numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{weight}_zeros"),
                ]
                parts = [f"{weight}_int8", f"{weight}_scales", f"{weight}_zeros"]
                nodes.append(
                    helper.make_node("DequantizeLinear", parts, [f"{weight}_float"], f"{weight}_dequantize", axis=1)
                )
            node.input[0], node.input[1] = f"{x}_seen", f"{weight}_float"
            nodes.append(node)
        used = {name for node in nodes for name in node.input}
        constants += [one for one in model.graph.initializer if one.name in used]
        for field, found in ((model.graph.node, nodes), (model.graph.initializer, constants)):
            del field[:]
            field.extend(found)
        return bytes(model.SerializeToString(deterministic=True))


def _session(graph: bytes | Path, threads: int) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    source = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])


# Ranges ------------------------------------------------------------------------------------------------------------------


def _ranges_of(plan: _Plan, texts: Texts, options: StaticInt8, folder: Path, context: PassContext) -> dict[str, Range]:
    """The range of each product's input, from running the graph over the texts, once for extremes and once for histograms."""
    kept = folder / "ranges.json"
    if kept.is_file():
        return {name: (low, high) for name, (low, high) in json.loads(kept.read_bytes()).items()}
    names = sorted(set(plan.inputs.values()))
    extremes = dict.fromkeys(names, (0.0, 0.0))
    for values in _inputs_seen(plan, names, texts, context, 0.2, 0.4):
        for name, one in values.items():
            low, high = extremes[name]
            extremes[name] = min(low, float(one.min())), max(high, float(one.max()))
    if not np.isfinite(list(extremes.values())).all():
        raise NightpressError(
            ErrorCode.NUMERICAL_FAILURE,
            "A layer of the graph is given values that are not finite.",
            hint="Check the model's weights.",
        )
    found = extremes
    if options.ranges != "min-max":
        counts = {name: np.zeros(activation_ranges.BINS) for name in names}
        for values in _inputs_seen(plan, names, texts, context, 0.4, 0.6):
            for name, one in values.items():
                counts[name] += activation_ranges.count(one, *extremes[name])
        choose: dict[str, Callable[[Histogram], Range]] = {
            "percentile": lambda one: activation_ranges.percentile(one, options.percentile),
            "entropy": activation_ranges.entropy,
            "mse": activation_ranges.mse,
        }
        found = {name: choose[options.ranges](Histogram(*extremes[name], counts[name])) for name in names}
    write_file(kept, json.dumps(found).encode())
    context.whole(1, kept)
    return found


def _inputs_seen(
    plan: _Plan, names: Sequence[str], texts: Texts, context: PassContext, start: float, end: float
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """What each tensor holds where the texts have tokens, a batch at a time."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(plan.model)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = _session(model.SerializeToString(), context.threads)
    inputs = {one.name for one in session.get_inputs()}
    done = 0
    for feeds in texts.feeds(inputs, GRAPH_TOKENS):
        real = feeds["attention_mask"] > 0
        values = dict(zip(names, session.run(list(names), feeds), strict=True))
        done += len(real)
        context.progress(
            start + (end - start) * done / len(texts.ids), f"calibrating, {done} of {len(texts.ids)} texts"
        )
        yield {name: one[real] if one.shape[:2] == real.shape else one for name, one in values.items()}


# Sensitive layers --------------------------------------------------------------------------------------------------------


class _Judge:
    """How near a quantized graph's answers to the held texts are to the float graph's."""

    def __init__(self, graph: Path, model_dir: Path, texts: Texts, context: PassContext) -> None:
        self._texts, self._threads = texts, context.threads
        self._pooling = pooling_of(model_dir) if context.header.task == "embedding" else None
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
        session = _session(graph, self._threads)
        inputs = {one.name for one in session.get_inputs()}
        for feeds in texts.feeds(inputs, tokens=1):
            out = session.run(None, feeds)[0]
            weights = feeds["attention_mask"][:, :, None].astype(np.float32)
            if self._pooling == "cls":
                out = out[:, 0]
            elif self._pooling:
                out = (out * weights).sum(axis=1) / weights.sum(axis=1)
            elif out.ndim == 3:
                out = out * weights
            yield out


def _left_in_float(
    names: Sequence[str],
    score: Callable[..., float],
    least: float | None,
    texts: int,
    context: PassContext,
) -> tuple[frozenset[str], float]:
    """The fewest of the worst layers without which the cosine reaches `least`, and that cosine.

    score(layers left in float, number of texts) → cosine. Layers are ranked by what each costs alone in int8; how many of
    them stay in float is found by bisection.
    """
    context.progress(0.6, "judging the quantized graph")
    cosine = score(())
    if least is None or cosine >= least:
        return frozenset(), cosine
    alone = {}
    for at, name in enumerate(names):
        alone[name] = score(set(names) - {name}, max(1, texts // _RANKED_SHARE))
        context.progress(0.65 + 0.25 * (at + 1) / len(names), f"weighing layer {at + 1} of {len(names)}")
    order = sorted(names, key=lambda name: (alone[name], name))
    few, many, found = 1, len(order), {0: cosine}
    while few < many:
        middle = (few + many) // 2
        found[middle] = score(set(order[:middle]))
        few, many = (few, middle) if found[middle] >= least else (middle + 1, many)
    if many == len(order):
        best = max(found.values())
        raise invalid(
            f"`static-int8` can't hold `min_cosine: {least:g}` with any layer in int8; the best that was tried reached {best:.5f}.",
            "Lower `min_cosine`, try another `ranges`, or use `dynamic-int8`.",
        )
    return frozenset(order[:many]), found[many]
