"""From a recipe to the examples that every model of a job is run on, and from their outputs to measurements."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.compress.evaluate import data
from core.compress.evaluate.consumer import Observed, Shape, Task, TokenSet
from core.compress.evaluate.statistics import Interval, Paired, mean_interval, ratio_against
from core.errors import ErrorCode, NightpressError
from core.handoff.report import Measurement, Timing
from core.recipes.header import ModelHeader
from core.recipes.models import Latency, Quality, Recipe

Metric = Literal["perplexity", "accuracy", "fidelity"]

_CHECK_ROWS = 8  #: texts of differing lengths in the verification
_COMPARED_BYTES = 32 * 1024**2  #: saved distributions of the source; the KL divergence is taken over so many positions
_SEED = 20  #: of the bootstrap; the recipe's seed is added


@dataclass(frozen=True)
class Evaluation:
    """One entry of the recipe's `evaluate`, bound to its examples."""

    set_name: str
    metric: Metric
    ref: str


@dataclass(frozen=True)
class Trial:
    """Everything that is run with the source and with each artifact."""

    task: Task
    evaluations: tuple[Evaluation, ...]
    seed: int


def prepare(
    recipe: Recipe, header: ModelHeader, model_dir: Path, data_files: dict[str, Path], *, threads: int
) -> Trial:
    """Read the data, tokenize it with the model's tokenizer and decide what is measured. Raises invalid_data, malformed_model, invalid_recipe."""
    tokenizer = data.open_tokenizer(model_dir)
    qualities = [one for one in recipe.evaluate if isinstance(one, Quality)]
    shapes = tuple(
        Shape(batch, length, one.repeats)
        for one in recipe.evaluate
        if isinstance(one, Latency)
        for batch in one.batch
        for length in one.length
    )
    _check_lengths(header, [one.length for one in qualities] + [one.length for one in shapes])
    # The check texts also choose the layers that stay in float: they must not come from what the result is measured on.
    prose = data.read_rows("builtin:prose", None, purpose="calibration")
    sets: list[TokenSet] = [_check_set(prose, tokenizer, header)]
    evaluations = []
    for at, one in enumerate(qualities):
        rows = data.read_rows(one.data, data_files.get(one.data))
        metric = _metric(one, header, rows)
        name = f"quality{at}"
        sets.append(_examples(name, metric, one, rows, tokenizer, header, recipe.seed))
        evaluations.append(Evaluation(name, metric, one.data))
    longest = max([shape.length for shape in shapes], default=16)
    timing = data.text_windows(prose, tokenizer, samples=8, length=min(longest, 512), ref="builtin:prose").ids.ravel()
    for one_set in sets:
        data.check_vocabulary(one_set.sequences, header)
    return Trial(
        task=Task(
            name=header.task,
            sets=tuple(sets),
            shapes=shapes,
            timing_ids=timing,
            pooling=_pooling(model_dir),
            classes=int(header.config.get("vocab_size") or 1),
            threads=threads,
        ),
        evaluations=tuple(evaluations),
        seed=_SEED + recipe.seed,
    )


def _check_lengths(header: ModelHeader, lengths: list[int]) -> None:
    limit = header.config.get("max_position_embeddings") or header.config.get("n_positions")
    if not isinstance(limit, int):
        return
    if header.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"}:
        limit -= 2  # these count positions from their padding token on
    if max(lengths, default=0) > limit:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"evaluate: a length of {max(lengths)} tokens is more than the model's {limit} positions.",
            hint=f"Use {limit} at most.",
        )


def _metric(one: Quality, header: ModelHeader, rows: list[data.Row]) -> Metric:
    if one.metric != "auto":
        return one.metric
    if header.task == "causal-lm":
        return "perplexity"
    if header.task == "classification" and all(row.label is not None for row in rows):
        return "accuracy"
    return "fidelity"


def _check_set(prose: list[data.Row], tokenizer: data.Tokenizer, header: ModelHeader) -> TokenSet:
    """A few texts of differing lengths in one padded batch: an artifact that ignores its mask is found out."""
    texts = [row for row in prose if len(row.text) > 200][:_CHECK_ROWS]
    encoded = [tokenizer.encode(row.text, special=True)[: 12 + 5 * at] for at, row in enumerate(texts)]
    kind = {"embedding": "pooled", "classification": "logits"}.get(header.task, "last")
    return TokenSet("check", kind, data.pad(encoded, tokenizer.pad_id))


def _examples(
    name: str,
    metric: Metric,
    one: Quality,
    rows: list[data.Row],
    tokenizer: data.Tokenizer,
    header: ModelHeader,
    seed: int,
) -> TokenSet:
    labelled = any(row.label is not None for row in rows)
    if metric == "accuracy":
        sequences = data.labelled_rows(
            rows, tokenizer, header, samples=one.samples, length=one.length, seed=seed, ref=one.data
        )
    elif labelled and not header.is_decoder:
        sequences = data.text_rows(rows, tokenizer, samples=one.samples, length=one.length, seed=seed)
    else:
        sequences = data.text_windows(rows, tokenizer, samples=one.samples, length=one.length, ref=one.data)
    if len(sequences.ids) < 2:
        raise NightpressError(
            ErrorCode.INVALID_DATA,
            f"The data set {one.data} has a single usable example: no interval can be given.",
            hint="Bring at least two rows.",
        )
    if header.task == "embedding":
        return TokenSet(name, "pooled", sequences)
    if header.task == "classification":
        return TokenSet(name, "logits", sequences)
    if header.task == "masked-lm":
        sequences = data.masked_targets(sequences, tokenizer, seed=seed)
        width = int(header.config.get("vocab_size") or 1)
    elif header.task == "causal-lm":
        sequences = data.next_token_targets(sequences)
        width = int(header.config.get("vocab_size") or 1)
    else:
        sequences = data.every_token(sequences)
        width = data.class_count(header)
    return TokenSet(name, "tokens", sequences, compared=_compared(sequences, width))


def _compared(sequences: data.Sequences, width: int) -> NDArray[np.bool_]:
    """Positions, evenly spread over the scored ones, whose whole distributions are kept."""
    assert sequences.targets is not None
    scored = np.flatnonzero(sequences.targets.ravel() >= 0)
    count = max(1, min(len(scored), 512, _COMPARED_BYTES // (4 * width)))
    chosen = np.zeros(sequences.targets.size, bool)
    chosen[scored[np.linspace(0, len(scored) - 1, count).astype(np.int64)]] = True
    return chosen.reshape(sequences.targets.shape)


def _pooling(model_dir: Path) -> str:
    """How the model's card says its token vectors become one: mean unless its pooling module says the first token."""
    file = model_dir / "1_Pooling" / "config.json"
    if file.is_file():
        try:
            raw = json.loads(file.read_bytes())
        except ValueError:
            return "mean"
        if raw.get("pooling_mode_cls_token"):
            return "cls"
    return "mean"


# Measurements --------------------------------------------------------------------------------------------------------


def measurements(
    trial: Trial, header: ModelHeader, source: Observed, artifact: Observed | None
) -> tuple[Measurement, ...]:
    """What the outputs say of the source (`artifact` None) or of an artifact beside it."""
    found: list[Measurement] = []
    for one in trial.evaluations:
        examples = next(candidate for candidate in trial.task.sets if candidate.name == one.set_name)
        found += _measure(one, examples, header, source, artifact, trial.seed)
    return tuple(found)


def _measure(
    one: Evaluation, examples: TokenSet, header: ModelHeader, source: Observed, artifact: Observed | None, seed: int
) -> list[Measurement]:
    ours = artifact or source
    result: list[Measurement] = []
    if examples.kind == "tokens":
        targets = examples.sequences.targets
        assert targets is not None
        row = np.nonzero(targets >= 0)[0]
        count = len(targets)
        tokens = np.bincount(row, minlength=count).astype(np.float64)
        if header.task == "causal-lm":
            nll = [_sums(row, side.outputs[f"{one.set_name}.nll"], count) for side in (ours, source)]
            paired = ratio_against(nll[0], nll[1], tokens, seed=seed, of=np.exp)
            result.append(
                _paired("perplexity", paired, artifact, one, n=int(tokens.sum()), better="lower", unit="per token")
            )
        if artifact is not None:
            result += _token_fidelity(one, examples, row, tokens, source, artifact, seed)
    elif examples.kind == "logits":
        result += _classes(one, examples, source, artifact, seed)
    elif artifact is not None:
        cosines = row_cosines(artifact.outputs[f"{one.set_name}.values"], source.outputs[f"{one.set_name}.values"])
        interval = mean_interval(cosines, seed=seed)
        result.append(_plain("cosine", interval, one, n=len(cosines), better="higher"))
    return result


def _sums(row: NDArray[np.int64], values: NDArray[Any], count: int) -> NDArray[np.float64]:
    """One number a token → one a window, which is what is resampled: tokens of one text are not independent."""
    return np.bincount(row, values.astype(np.float64), minlength=count).astype(np.float64)


def _token_fidelity(
    one: Evaluation,
    examples: TokenSet,
    row: NDArray[np.int64],
    tokens: NDArray[np.float64],
    source: Observed,
    artifact: Observed,
    seed: int,
) -> list[Measurement]:
    same = artifact.outputs[f"{one.set_name}.top1"] == source.outputs[f"{one.set_name}.top1"]
    agreed = _sums(row, same, len(tokens))
    used = tokens > 0
    agreement = mean_interval(agreed[used], weights=tokens[used], seed=seed)
    assert examples.compared is not None
    compared_row = np.nonzero(examples.compared)[0]
    kl = np.maximum(artifact.outputs[f"{one.set_name}.kl"].astype(np.float64), 0)
    sums = _sums(compared_row, kl, len(tokens))
    counts = np.bincount(compared_row, minlength=len(tokens)).astype(np.float64)
    used = counts > 0
    divergence = mean_interval(sums[used], weights=counts[used], seed=seed)
    return [
        _plain("top1_agreement", agreement, one, n=int(tokens.sum()), better="higher"),
        _plain("kl_divergence", divergence, one, n=len(kl), better="lower", unit="nats"),
    ]


def _classes(
    one: Evaluation, examples: TokenSet, source: Observed, artifact: Observed | None, seed: int
) -> list[Measurement]:
    theirs = source.outputs[f"{one.set_name}.values"].astype(np.float64)
    ours = theirs if artifact is None else artifact.outputs[f"{one.set_name}.values"].astype(np.float64)
    result = []
    labels = examples.sequences.labels
    if one.metric == "accuracy" and labels is not None:
        hits = [(logits.argmax(axis=1) == labels).astype(np.float64) for logits in (ours, theirs)]
        paired = ratio_against(hits[0], hits[1], np.ones(len(labels)), seed=seed)
        result.append(_paired("accuracy", paired, artifact, one, n=len(labels), better="higher"))
    if artifact is not None:
        agree = (ours.argmax(axis=1) == theirs.argmax(axis=1)).astype(np.float64)
        p, q = _log_softmax(theirs), _log_softmax(ours)
        kl = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0)
        result.append(_plain("top1_agreement", mean_interval(agree, seed=seed), one, n=len(agree), better="higher"))
        result.append(
            _plain("kl_divergence", mean_interval(kl, seed=seed), one, n=len(kl), better="lower", unit="nats")
        )
    return result


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def row_cosines(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine of each row with the other model's. [N, H] each → [N]"""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(norms, 1e-30)
    return result


def whole_cosine(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> float:
    """Cosine of two sets of outputs, each taken as one vector."""
    return float(row_cosines(ours.reshape(1, -1), theirs.reshape(1, -1))[0])


def _plain(
    name: str, interval: Interval, one: Evaluation, *, n: int, better: Literal["higher", "lower"], unit: str = ""
) -> Measurement:
    return Measurement(
        name=name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=n,
        unit=unit,
        better=better,
        data=one.ref,
    )


def _paired(
    name: str,
    paired: Paired,
    artifact: Observed | None,
    one: Evaluation,
    *,
    n: int,
    better: Literal["higher", "lower"],
    unit: str = "",
) -> Measurement:
    change = paired.change if artifact is not None else None
    return _plain(name, paired.figure, one, n=n, better=better, unit=unit).model_copy(
        update={
            "change": change.value if change else None,
            "change_low": change.low if change else None,
            "change_high": change.high if change else None,
        }
    )


def timings(observed: Observed, task: Task) -> tuple[Timing, ...]:
    """Medians and 95th percentiles of the timed runs."""
    found = []
    for one in observed.timings:
        p50, p95 = np.percentile(one["milliseconds"], [50, 95])
        per_run = one["batch"] * (one["length"] if task.name == "causal-lm" else 1)
        found.append(
            Timing(
                batch=one["batch"],
                length=one["length"],
                threads=task.threads,
                repeats=len(one["milliseconds"]),
                p50_ms=float(p50),
                p95_ms=float(p95),
                throughput=1000 * per_run / float(p50),
                throughput_unit="tokens/s" if task.name == "causal-lm" else "sequences/s",
            )
        )
    return tuple(found)
