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
from nightpress.core.compress.data.decoder_text import first_tokens
from nightpress.core.compress.data.rows import read_rows
from nightpress.core.compress.data.tokenized import open_tokenizer, text_windows
from nightpress.core.compress.graph.samples import Samples, answer, session, written
from nightpress.core.compress.graph.static_model import StaticModel
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.model.cosines import row_cosines
from nightpress.core.compress.passes.registry import graph_pass
from nightpress.core.compress.passes.within import Candidate, Search, bisect
from nightpress.core.compress.runners.encoder_decoder import decoder_text, ends_of
from nightpress.core.compress.runners.measure import pool
from nightpress.core.handoff.report import PassRecord, Within
from nightpress.core.processor import cpu_features
from nightpress.core.recipes.costs import GRAPH_TOKENS, TRIAL_TOKENS
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes import StaticInt8

_NUMBER = re.compile(r"\d+")  #: layers whose names differ only in numbers are of the same kind
_TRIAL_LENGTH = 128  #: tokens of each held-out text
_WRITTEN = 64  #: tokens that a decoder writes for each sample
_PATCH = 16  #: pixels in a row of an image's patch, where the model doesn't say
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
    graphs, report = {name: folder / f"{name}.onnx" for name in traced.graphs}, folder / "record.json"
    if not report.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        seen, held = _samples(model_dir, traced, context)
        model = StaticModel.calibrate(traced.graphs, seen, options, bits, folder, context)
        fidelity = _GraphFidelity(traced.graphs, held, context)

        def score(left: Collection[str], texts: int | None = None) -> float:
            return fidelity.cosine(model.written(left), texts)

        share = 1 if context.header.task == "classification" else _RANKED_SHARE
        order = _Order(model.costs, model.work(_TRIAL_LENGTH), score, max(1, len(held) // share), context)
        found: Within | None = None
        warnings: tuple[str, ...] = ()
        if options.within is None:
            left, cosine = _reaching(options.min_cosine, order, score, context)
        else:
            left, found, warnings = _within(order, model.written, options, folder, context)
            cosine = score(left)
        with disk_errors():
            partial = folder / "partial.onnx"
            for name, graph in model.written(left).items():
                partial.write_bytes(graph)
                partial.replace(graphs[name])
        record = PassRecord(
            index=context.index,
            name=options.name,
            seconds=time.monotonic() - start,
            summary={
                "ranges": options.ranges,
                "weight_bits": bits,
                "calibration_tokens": seen.tokens,
                "matrices": len(model.products - left),
                "attention_scores": len(model.scores - left),
                "left_in_float": sorted(left),
                "cosine_held_apart": round(cosine, 6),
                "min_cosine_held": options.min_cosine is None or cosine >= options.min_cosine,
                "cosine_gained_by_kind": order.gained,
            },
            layers=model.effects(left),
            within=found,
            warnings=warnings,
        )
        write_file(report, record.model_dump_json().encode())
        context.whole(2, *graphs.values(), report)
    *encoder, last = graphs.values()
    rounded = replace(traced, path=last, encoder=encoder[0] if encoder else None)
    return rounded, PassRecord.model_validate_json(report.read_bytes())


def weight_bits(options: StaticInt8) -> int:
    if options.weight_bits != "auto":
        return options.weight_bits
    have = set(cpu_features())
    return 7 if "avx2" in have and not have & {"avx_vnni", "avx512_vnni", "amx_int8"} else 8


def _samples(model_dir: Path, traced: Traced, context: PassContext) -> tuple[Samples, Samples]:
    """Return (samples for calibration, held-out samples for comparing the graphs)."""
    header, found = context.header, calibration_samples(model_dir, context)
    given = {name: values.numpy() for name, values in found.items() if not name.startswith("decoder_")}
    first = next(iter(given.values()))
    count = len(first)
    if first.ndim == 2:
        mask = given.setdefault("attention_mask", np.ones_like(first))
        given.setdefault("token_type_ids", np.zeros_like(first))
        samples = Samples(given, mask, first.shape[1])
    else:
        patch = int(header.config.get("patch_size") or _PATCH) if header.sees_images else 0
        length = first.shape[2] * first.shape[3] // patch**2 if patch else first.shape[2] // 2
        samples = Samples(given, np.ones((count, 1), np.int64), max(1, length))
    if count < 2:
        raise invalid(
            "`static-int8` needs two calibration samples: one to find ranges on, one to judge them on.",
            "Raise `samples`.",
        )
    if traced.encoder is not None:
        samples = _with_decoder_text(model_dir, traced, samples, context)
    held = min(max(1, TRIAL_TOKENS // _TRIAL_LENGTH), max(1, count // 4))
    return samples[: count - held], samples[count - held :].cut(_TRIAL_LENGTH)


def _with_decoder_text(model_dir: Path, traced: Traced, samples: Samples, context: PassContext) -> Samples:
    """The same samples with what an encoder-decoder's decoder reads.

    For every other sample it is what the float model itself writes: that is what it will see in use. A model may write the same few words
    for all of them, so for the others it is the sample's own text, or prose where the sample is a sound.
    """
    header, prefix = context.header, first_tokens(model_dir, context.header)
    sessions = {name: session(graph, context.threads) for name, graph in traced.graphs.items()}
    room = (header.positions or _WRITTEN) - len(prefix)
    tokens = max(1, min(_WRITTEN, room, context.calibration.length))
    context.progress(0.1, "writing what the decoder reads while it is calibrated")
    found = written(sessions, samples, prefix, ends_of(str(model_dir)), tokens, GRAPH_TOKENS)
    assert found.decoder is not None
    assert found.decoder_mask is not None
    texts = samples.given.get("input_ids")
    if texts is None:
        prose = read_rows("builtin:prose", None, purpose="calibration")
        tokenizer = open_tokenizer(model_dir)
        texts = text_windows(prose, tokenizer, samples=len(samples), length=max(16, tokens), ref="builtin:prose").ids
        texts = np.resize(texts, (len(samples), texts.shape[1]))
    told = decoder_text(texts, list(prefix))
    width = min(told.shape[1], found.decoder.shape[1])
    real = samples.mask[:, :width] if samples.mask.shape[1] > 1 else np.ones_like(told[:, :width])
    decoder, mask = found.decoder.copy(), found.decoder_mask.copy()
    mask[1::2] = 0
    decoder[1::2, :width], mask[1::2, :width] = told[1::2, :width], real[1::2]
    return replace(found, decoder=decoder, decoder_mask=mask)


class _GraphFidelity:
    """Compares the outputs of quantized graphs on the held-out samples with those of the float graphs.

    An encoder-decoder is run as a whole: the rounded decoder reads the rounded encoder's answer, and is told what was written before.
    """

    def __init__(self, graphs: Mapping[str, Path], samples: Samples, context: PassContext) -> None:
        self._samples, self._context = samples, context
        self._pooling = context.header.pooling if context.header.task == "embedding" else None
        self._expected = list(self._answers(graphs, samples))

    def cosine(self, graphs: Mapping[str, bytes], texts: int | None = None) -> float:
        """Return the cosine of both graphs' outputs: for an embedder the mean over pooled vectors, else that of all logits as one vector.

        texts: number of held-out samples to use; None: all.
        """
        held = self._samples[:texts] if texts else self._samples
        pairs = zip(self._answers(graphs, held), self._expected[: len(held)], strict=True)
        if self._pooling:
            return float(np.mean([row_cosines(ours, theirs)[0] for ours, theirs in pairs]))
        product, ours_squared, theirs_squared = 0.0, 0.0, 0.0
        for ours, theirs in pairs:
            a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
            product += float(a @ b)
            ours_squared += float(a @ a)
            theirs_squared += float(b @ b)
        return float(product / max((ours_squared * theirs_squared) ** 0.5, 1e-30))

    def _answers(self, graphs: Mapping[str, bytes | Path], samples: Samples) -> Iterator[NDArray[np.float32]]:
        """Yield the graphs' output for one sample at a time, because the logits of a language model are large."""
        sessions = {name: session(graph, self._context.threads) for name, graph in graphs.items()}
        for at, sample in enumerate(samples.batches(1)):
            self._context.progress(0.6, f"answering samples held apart, {at + 1} of {len(samples)}")
            out, mask = answer(sessions, sample)
            if self._pooling:
                out = pool(out, mask, self._pooling)
            elif out.ndim == 3:
                out = out * mask[:, :, None].astype(np.float32)
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
    written: Callable[[frozenset[str]], Mapping[str, bytes]],
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
            graphs = written(order.first(count)).items()
            size = sum((tried / f"{name}.onnx").write_bytes(graph) for name, graph in graphs)
        return Candidate(size, search.judge.graph(tried))

    count, kept = search.run(make, first=0)
    shutil.rmtree(tried, ignore_errors=True)
    return order.first(count), search.outcome(count, kept=kept), search.warnings(kept=kept)
