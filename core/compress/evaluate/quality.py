"""Prepares the examples that a recipe evaluates every model of a job on, and turns the models' outputs into measurements."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.data.decoder_text import first_tokens, read_by_decoder
from nightpress.core.compress.data.pairs import has_pairs, pair_rows
from nightpress.core.compress.data.rows import Row
from nightpress.core.compress.evaluate import (
    embeddings,
    fidelity,
    labels,
    language,
    many_labels,
    neighbours,
    ranking,
    senses,
)
from nightpress.core.compress.evaluate.screening import SAMPLES
from nightpress.core.compress.evaluate.slices import by_slice, worst_first
from nightpress.core.compress.evaluate.view import Evaluation, OutputPair, Scorer, ScorerRequest
from nightpress.core.compress.export.consumer import Observed
from nightpress.core.compress.export.task import Task, TimedGeneration, TimedShape, TokenSet
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Measurement, Slice
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import GenerationSpeed, Latency, Metric, Quality, Recipe
from nightpress.core.recipes.plan import timed_by_turns, timed_uncompressed
from nightpress.core.recipes.textfile import invalid

_CHECK_ROWS = 8  #: texts of different lengths in the verification
_CHECK_STEPS = 6  #: tokens that an encoder-decoder writes in the verification, each by a run of its decoder
_UNCACHED_TOKENS = 4  #: few, because without a cache each token reads the whole text again
_SEED = 20  #: of the bootstrap; the recipe's seed is added to it

_SCORERS: dict[Metric, Callable[[ScorerRequest], Scorer]] = {
    "perplexity": language.perplexity,
    "masked-lm": language.masked_lm,
    "multiple-choice": language.choices,
    "generation": language.generation,
    "accuracy": labels.classification,
    "regression": many_labels.numbers,
    "entities": labels.entities,
    "similarity": embeddings.similarity,
    "retrieval": embeddings.retrieval,
    "ranking": ranking.ranking,
    "neighbours": neighbours.neighbours,
    "fidelity": fidelity.prepare,
}


@dataclass(frozen=True)
class Trial:
    """Everything that runs on the source and on each artifact."""

    task: Task
    evaluations: tuple[Evaluation, ...]
    seed: int
    uncompressed: tuple[
        Export, ...
    ]  #: exports of the source that are timed by turns with the artifacts of their runtime
    by_turns: bool  #: whether source and artifact may be timed by turns; the plan's estimate assumes the same
    screen: tuple[Evaluation, ...] = ()  #: evaluations on few texts, for a screening right after the passes
    choose: tuple[Evaluation, ...] = ()  #: evaluations on the half of the data that chooses, for passes with `within`

    @property
    def source_task(self) -> Task:
        """What runs on the source: also the texts that screen and choose, so that the source is loaded once."""
        others = (entry.scorer.examples for entry in (*self.screen, *self.choose))
        return replace(self.task, sets=(*self.task.sets, *others))

    def only(self, evaluations: Sequence[Evaluation]) -> Task:
        """What runs on a pressed model before it is exported: some evaluations, and nothing is timed."""
        sets = (self.task.sets[0], *(entry.scorer.examples for entry in evaluations))
        return replace(self.task, sets=sets, shapes=(), writings=())


def prepare(
    recipe: Recipe, header: ModelHeader, model_dir: Path, data_files: dict[str, Path], *, threads: int
) -> Trial:
    """Read the data, tokenize it with the model's tokenizer and decide what is measured.

    Raises NightpressError: invalid_data, malformed_model or invalid_recipe.
    """
    if header.sees_images or header.hears:
        return _prepare_senses(recipe, header, model_dir, data_files, threads=threads)
    tokenizer = tokenized.open_tokenizer(model_dir)
    qualities = [evaluation for evaluation in recipe.evaluate if isinstance(evaluation, Quality)]
    shapes = _shapes(recipe)
    longest_text = [quality.length + quality.new_tokens * (quality.metric == "generation") for quality in qualities]
    writings = _writings(recipe)
    _check_lengths(header, longest_text + [shape.length for shape in shapes])
    # The check texts also decide which layers stay in float, so they must not come from the text of the evaluation.
    prose = tokenized.read_rows("builtin:prose", None, purpose="calibration")
    prefix = first_tokens(model_dir, header)
    sets: list[TokenSet] = [_check_set(prose, tokenizer, header, prefix)]
    evaluations = []
    evaluation_of = partial(_evaluation, recipe, header, model_dir, data_files, tokenizer, prefix)
    for at, quality in enumerate(qualities):
        evaluations.append(_checked(evaluation_of(f"quality{at}", quality)))
        sets.append(evaluations[-1].scorer.examples)
    few_texts = (evaluation_of(f"screen{at}", few) for at, few in _few_texts(recipe, qualities))
    screen = tuple(filter(_is_usable, few_texts))
    choose = tuple(_checked(evaluation_of(f"choose{at}", wanted)) for at, wanted in _choosing(recipe, qualities))
    longest = max([*(shape.length for shape in shapes), *(writing.prompt for writing in writings)], default=16)
    timing = tokenized.text_windows(
        prose, tokenizer, samples=8, length=min(longest, 512), ref="builtin:prose"
    ).ids.ravel()
    for token_set in (*sets, *(entry.scorer.examples for entry in choose)):
        tokenized.check_vocabulary(token_set.sequences, header)
    return Trial(
        task=Task(
            name=header.task,
            model_class=header.kind.loader,
            sets=tuple(sets),
            shapes=shapes,
            timing_ids=timing,
            pooling=header.pooling,
            classes=header.vocabulary or 1,
            threads=threads,
            writings=writings,
            prefix=prefix,
        ),
        evaluations=tuple(evaluations),
        seed=_SEED + recipe.seed,
        uncompressed=timed_uncompressed(recipe, header),
        by_turns=timed_by_turns(recipe, header),
        screen=screen,
        choose=choose,
    )


def _few_texts(recipe: Recipe, qualities: Sequence[Quality]) -> Iterator[tuple[int, Quality]]:
    """What a screening measures: what is measured on at least twice as many texts. Generated text is left out, because it takes long."""
    for at, wanted in enumerate(qualities if recipe.screen else []):
        if wanted.samples >= 2 * SAMPLES and wanted.metric != "generation":
            yield at, wanted.model_copy(update={"samples": SAMPLES})


def _choosing(recipe: Recipe, qualities: Sequence[Quality]) -> Iterator[tuple[int, Quality]]:
    """What measures the candidates of passes with `within`. Text is generated only for a gate on generated text."""
    gates = [gate for options in recipe.passes if (gate := options.gate_within) is not None]
    written = any(gate.metric in {"generation_match", "prefix_match"} for gate in gates)
    for at, wanted in enumerate(qualities if gates else []):
        if written or wanted.metric != "generation":
            yield at, wanted.model_copy(update={"part": "choose"})


def _evaluation(
    recipe: Recipe,
    header: ModelHeader,
    model_dir: Path,
    data_files: dict[str, Path],
    tokenizer: tokenized.Tokenizer,
    prefix: tuple[int, ...],
    name: str,
    wanted: Quality,
) -> Evaluation:
    """Read the data of an entry of the recipe's `evaluate`. prefix: the first tokens of a decoder. name: of its examples."""
    source = tokenized.DataSource(wanted.data, data_files.get(wanted.data), model_dir, wanted.part)
    request = ScorerRequest(name, wanted, source, tokenizer, header, recipe.seed, prefix)
    return Evaluation(wanted.data, _SCORERS[_metric(wanted, header, source)](request))


def _checked(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation. Raises NightpressError(invalid_data) if it has too few examples."""
    if not _is_usable(evaluation):
        raise invalid(
            evaluation.ref, "it has a single usable example: no interval can be given", "Bring at least two rows."
        )
    return evaluation


def _is_usable(evaluation: Evaluation) -> bool:
    """Whether it has enough examples for an interval."""
    return len(evaluation.scorer.examples.sequences.ids) >= 2


def _shapes(recipe: Recipe) -> tuple[TimedShape, ...]:
    return tuple(
        TimedShape(batch, length, evaluation.repeats)
        for evaluation in recipe.evaluate
        if isinstance(evaluation, Latency)
        for batch in evaluation.batch
        for length in evaluation.length
    )


def _writings(recipe: Recipe) -> tuple[TimedGeneration, ...]:
    """The timed generations that the recipe asks for. If a pass chooses a cache, also short ones without a cache, for comparison."""
    wanted = [
        TimedGeneration(batch, prompt, evaluation.tokens, evaluation.repeats)
        for evaluation in recipe.evaluate
        if isinstance(evaluation, GenerationSpeed)
        for batch in evaluation.batch
        for prompt in evaluation.prompt
    ]
    if not any(options.chooses_cache for options in recipe.passes):
        return tuple(wanted)
    without = [replace(speed, tokens=min(speed.tokens, _UNCACHED_TOKENS), repeats=3, cached=False) for speed in wanted]
    return (*wanted, *without)


def _prepare_senses(
    recipe: Recipe, header: ModelHeader, model_dir: Path, data_files: dict[str, Path], *, threads: int
) -> Trial:
    """`prepare` for a model that sees or hears: lengths of text do not matter, and each timed run reads whole images or sounds."""
    read = senses.images if header.sees_images else senses.sounds
    check, evaluations, sample = read(recipe, header, model_dir, data_files, _CHECK_ROWS, _CHECK_STEPS, _SEED)
    task = Task(
        name=header.task,
        model_class=header.kind.loader,
        sets=(check, *(evaluation.scorer.examples for evaluation in evaluations)),
        shapes=_shapes(recipe),
        timing_ids=sample,
        pooling="cls",
        classes=header.classes if header.sees_images else header.vocabulary or 1,
        threads=threads,
        writings=_writings(recipe),
        prefix=first_tokens(model_dir, header),
    )
    return Trial(
        task,
        tuple(evaluations),
        seed=_SEED + recipe.seed,
        uncompressed=timed_uncompressed(recipe, header),
        by_turns=timed_by_turns(recipe, header),
    )


def _check_lengths(header: ModelHeader, lengths: list[int]) -> None:
    limit = header.positions
    if limit is None:
        return
    if max(lengths, default=0) > limit:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"evaluate: a length of {max(lengths)} tokens is more than the model's {limit} positions.",
            hint=f"Use {limit} at most.",
        )


def _metric(quality: Quality, header: ModelHeader, source: tokenized.DataSource) -> Metric:
    if quality.metric != "auto":
        return quality.metric
    match header.task:
        case "causal-lm":
            return "perplexity"
        case "masked-lm":
            return "masked-lm"
        case "classification" if header.scores_pairs and (source.ref.startswith("builtin:") or has_pairs(source)):
            return "ranking" if _is_judged(source) else "fidelity"
        case "classification":
            rows = pair_rows(source) if has_pairs(source) else source.rows()
            if header.head == "numbers":
                fits = not header.scores_pairs and many_labels.are_numbers(rows, header.classes)
                return "regression" if fits else "fidelity"
            if all(row.label is not None for row in rows):
                return "accuracy"
        case "token-classification" if source.has("tags", "ner_tags"):
            return "entities"
    return "fidelity"


def _is_judged(source: tokenized.DataSource) -> bool:
    """Whether each document has a relevance: prose is split into such, and columns say it."""
    return source.ref.startswith("builtin:") or source.has(
        "positive", "label", "labels", "score", "scores", "relevance"
    )


def _check_set(
    prose: list[tokenized.Row], tokenizer: tokenized.Tokenizer, header: ModelHeader, prefix: tuple[int, ...]
) -> TokenSet:
    """A few texts of different lengths in one padded batch. They reveal an artifact that ignores its attention mask."""
    texts = [row for row in prose if len(row.text) > 200][:_CHECK_ROWS]
    if header.scores_pairs:
        halves = [Row(row.text[:60], second=row.text[60:]) for row in texts]
        pairs = [tokenized.encode_row(row, tokenizer, 16 + 5 * at) for at, row in enumerate(halves)]
        return TokenSet("check", "logits", tokenized.pad_typed(pairs, tokenizer.pad_id, header))
    encoded = [tokenizer.encode(row.text, special=True)[: 12 + 5 * at] for at, row in enumerate(texts)]
    if header.task == "seq2seq":
        sequences = tokenized.pad(encoded, tokenizer.pad_id)
        return TokenSet("check", "steps", read_by_decoder(sequences, prefix, tokens=len(prefix) + _CHECK_STEPS))
    kind = {"embedding": "pooled", "classification": "logits"}.get(header.task, "last")
    return TokenSet("check", kind, tokenized.pad(encoded, tokenizer.pad_id), alone=header.one_text_a_batch)


def measurements(trial: Trial, source: Observed, artifact: Observed | None) -> tuple[Measurement, ...]:
    """All measurements of an artifact compared with the source, or of the source alone if `artifact` is None."""
    return figures_of(trial.evaluations, trial.seed, source, artifact)


def slices(trial: Trial, source: Observed, artifact: Observed | None) -> tuple[Slice, ...]:
    """The figures of each slice, as in `measurements`; of an artifact, the slices that differ most from the source come first."""
    return slice_figures(trial.evaluations, trial.seed, source, artifact)


def figures_of(
    evaluations: Sequence[Evaluation], seed: int, source: Observed, artifact: Observed | None
) -> tuple[Measurement, ...]:
    """The measurements of some evaluations, as in `measurements`."""
    return tuple(
        figure
        for evaluation in evaluations
        for figure in evaluation.scorer.figures(_view(evaluation, seed, source, artifact))
    )


def slice_figures(
    evaluations: Sequence[Evaluation], seed: int, source: Observed, artifact: Observed | None
) -> tuple[Slice, ...]:
    """The slices of some evaluations, as in `slices`."""
    found = [
        part
        for evaluation in evaluations
        for part in by_slice(evaluation.scorer, _view(evaluation, seed, source, artifact))
    ]
    return tuple(worst_first(found))


def _view(evaluation: Evaluation, seed: int, source: Observed, artifact: Observed | None) -> OutputPair:
    return OutputPair(evaluation.scorer.examples.name, evaluation.ref, source, artifact, seed)
