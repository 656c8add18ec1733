"""Memory and time of the measurements: a consumer's process for the source and for each artifact.

On the processor, models are measured in fp32. A job on a GPU measures there what transformers loads, in the stored number type.
"""

from collections.abc import Mapping

from nightpress.core.recipes.costs import (
    CONSUMER_BYTES,
    GPU_CHILD_BYTES,
    GPU_CONSUMER_BYTES,
    GPU_RUNTIME_BYTES,
    GRAPH_CONSUMER_BYTES,
    LOGIT_BYTES,
    TRACED_BYTES,
    Cost,
    cached_trace_seconds,
    made_graph_bytes,
)
from nightpress.core.recipes.exports import GRAPH_FORMATS, Export
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.models import Evaluation, GenerationSpeed, Latency, Quality, Recipe
from nightpress.core.recipes.passes.base import Stage

_IMPORT_S = 3.5  #: seconds to start a consumer's process with torch and transformers
_GRAPH_S = 4.0  #: seconds to trace, and to start a consumer with only a graph runtime
_SETTLE_S = 0.1  #: seconds that a model runs untimed before a timed run, at least
_DECODE_STEP = 10  #: time to decode a token, in tokens of a long forward pass
_LOGIT_COPIES = 2.2  #: copies of a batch's logits: their logarithms, and the logits that they are compared with
_MOST_ROWS = 16  #: largest number of texts in a batch
_BESIDE_BYTES = 3 * 1024**3 // 2  #: bytes that source and artifact may always take together to be timed by turns


def measuring_cost(recipe: Recipe, header: ModelHeader, outputs: Mapping[str, int], pass_bytes: int) -> Cost:
    """Return the cost of measuring: the source and each artifact are loaded in their own process, and run every evaluation.

    outputs: bytes of each artifact, by export. pass_bytes: the most memory that the passes take.
    """
    tokens = sum(_tokens(evaluation) for evaluation in recipe.evaluate)
    starts = [_IMPORT_S, *(_GRAPH_S if export.format in GRAPH_FORMATS else _IMPORT_S for export in recipe.exports)]
    traced = any(export.format in GRAPH_FORMATS for export in recipe.exports)  # all graph exports share a trace
    models = (None, *recipe.exports)
    settling = _SETTLE_S * sum(_timed_runs(evaluation) for evaluation in recipe.evaluate)
    seconds = sum(starts) + traced * cached_trace_seconds(header) + len(models) * settling
    on_gpu = sum(recipe.measured_on_gpu(export) for export in models)
    work = on_gpu * tokens * header.parameters
    host_work = (len(models) - on_gpu) * tokens * header.parameters
    gpu = _gpu_bytes(recipe, header) if on_gpu else 0
    memory = max(_bytes(recipe, header, export, outputs) for export in models)
    beside_gpu = max(_bytes_beside_gpu(recipe, header, export, outputs) for export in models)
    turns, timed = timed_by_turns(recipe, header, outputs, pass_bytes), _timed_tokens(recipe) * header.parameters
    plain = timed_uncompressed(recipe, header, outputs, pass_bytes)
    beside = max((uncompressed_bytes(header, export) for export in plain), default=0)
    seconds += (_GRAPH_S + settling) * len(plain)  # exported once, and started beside each artifact
    if any(export.format in GRAPH_FORMATS for export in plain):
        seconds += cached_trace_seconds(header)
    host_work += len(plain) * timed
    if not turns:
        memory = max(memory, beside + _timing_bytes(recipe, header, outputs, source=False)) if plain else memory
        return Cost(memory, seconds, work, gpu, host_bytes=beside_gpu + beside, host_work=host_work)
    also_on_gpu = sum(recipe.measured_on_gpu(export) for export in recipe.exports)
    _, together = _alone_and_together(recipe, header, outputs)
    source = CONSUMER_BYTES + (0 if also_on_gpu == len(recipe.exports) else 4 * header.parameters)
    return Cost(
        max(together, beside + _timing_bytes(recipe, header, outputs, source=True)),
        seconds + _IMPORT_S + len(recipe.exports) * settling,
        work + also_on_gpu * timed,  # the source runs again beside each artifact
        gpu,
        host_bytes=beside_gpu + source + beside,
        host_work=host_work + (len(recipe.exports) - also_on_gpu) * timed,
    )


def check_searches(recipe: Recipe, header: ModelHeader | None) -> None:
    """Raise NightpressError(invalid_recipe) if a pass is to keep a gate that nothing measures. header: None if no model was named."""
    searching = next((options for options in recipe.passes if options.gate_within is not None), None)
    if searching is None:
        return
    if not any(isinstance(entry, Quality) for entry in recipe.evaluate):
        raise invalid(
            f"`{searching.name}`: nothing in `evaluate` measures quality, so that nothing can be kept `within` a gate.",
            "Add an evaluation, e.g. `{metric: auto}`.",
        )
    if header is not None and (header.sees_images or header.hears):
        what = "images" if header.sees_images else "sounds"
        raise invalid(
            f"`{searching.name}`: `within` divides the evaluation's data into two halves, and {what} are not divided.",
            "Leave `within` out, and give the pass its options.",
        )


def searching_cost(recipe: Recipe, header: ModelHeader, stage: Stage, tries: int) -> Cost:
    """Return the cost of measuring the candidates of a search within a gate, and the source on the same data.

    stage: of the pass that searches. Candidates of the stage `graph` run in a graph's runtime. tries: number of candidates.
    """
    if not tries:
        return Cost(0, 0.0)
    work = sum(_tokens(entry) for entry in recipe.evaluate if isinstance(entry, Quality)) * header.parameters
    on_gpu = stage == "folder" and recipe.measured_on_gpu(None)
    return Cost(
        0,
        tries * (_GRAPH_S if stage == "graph" else _IMPORT_S),
        work * (recipe.measured_on_gpu(None) + on_gpu * tries),
        host_work=work * (not recipe.measured_on_gpu(None)) + work * tries * (not on_gpu),
    )


def _gpu_bytes(recipe: Recipe, header: ModelHeader) -> int:
    """Return the bytes of a GPU's memory for a consumer: a second process on the GPU, the float weights, and a batch's logits twice."""
    return GPU_RUNTIME_BYTES + header.size + 2 * max(LOGIT_BYTES, _batch_bytes(recipe, header))


def timed_by_turns(recipe: Recipe, header: ModelHeader, outputs: Mapping[str, int], pass_bytes: int) -> bool:
    """Return whether the source's process stays loaded while an artifact is timed, so that their runs alternate.

    It does if both together take little memory, or no more than the job takes anyway.
    """
    if not _timed_tokens(recipe):
        return False
    alone, together = _alone_and_together(recipe, header, outputs)
    return together <= max(_BESIDE_BYTES, alone, pass_bytes)


def timed_uncompressed(
    recipe: Recipe, header: ModelHeader, outputs: Mapping[str, int], pass_bytes: int
) -> tuple[Export, ...]:
    """Return the exports of the uncompressed model that are timed by turns with the artifacts of their runtime.

    Those that memory would not hold are left out: together with artifact and source, they may take no more than these may without them.
    """
    if not _timed_tokens(recipe):
        return ()
    changed = any(options.stage != "measure" for options in recipe.passes)
    wanted: dict[str, Export] = {}
    for export in recipe.exports:
        plain = export.uncompressed
        if plain is not None and (changed or export.weights != plain.weights):
            wanted[plain.name] = plain
    most = max(_BESIDE_BYTES, _alone_and_together(recipe, header, outputs)[0], pass_bytes)
    turns = timed_by_turns(recipe, header, outputs, pass_bytes)
    held = _timing_bytes(recipe, header, outputs, source=turns)
    return tuple(plain for plain in wanted.values() if held + uncompressed_bytes(header, plain) <= most)


def uncompressed_bytes(header: ModelHeader, plain: Export) -> int:
    """Return the bytes of a process that runs an uncompressed model in its runtime. llama.cpp maps the weights from their file."""
    weights = 0 if plain.format == "gguf" else sum(plain.stored_bytes(tensor) for tensor in header.tensors)
    return GRAPH_CONSUMER_BYTES + weights


def _timing_bytes(recipe: Recipe, header: ModelHeader, outputs: Mapping[str, int], *, source: bool) -> int:
    """Return the bytes of the largest artifact's process, and of the source's beside it if it stays loaded."""
    beside = (CONSUMER_BYTES + 4 * header.parameters * (not _mapped(header))) * source
    return beside + max(_consumer_bytes(recipe, header, export, outputs) for export in recipe.exports)


def _alone_and_together(recipe: Recipe, header: ModelHeader, outputs: Mapping[str, int]) -> tuple[int, int]:
    """Return the bytes if models are measured one after the other, and the bytes if the source's process stays beside each artifact's."""
    alone = max(_bytes(recipe, header, export, outputs) for export in (None, *recipe.exports))
    return alone, max(alone, _timing_bytes(recipe, header, outputs, source=True))


def _mapped(header: ModelHeader) -> bool:
    """Return whether the weights are mapped from their file: only fp32 weights are."""
    return all(tensor.dtype in {"F32", "I64"} for tensor in header.tensors)


def _bytes(recipe: Recipe, header: ModelHeader, export: Export | None, outputs: Mapping[str, int]) -> int:
    """Return the larger of the child's bytes while it makes a graph, and the bytes of child and consumer while they measure.

    export: None for the source.
    """
    held = _consumer_bytes(recipe, header, export, outputs)
    if export is None or export.format not in GRAPH_FORMATS:
        return held
    rounded = any(options.stage == "runtime" for options in recipe.passes)
    floats = _mapped(header) and not any(options.quantizes for options in recipe.passes)
    made = made_graph_bytes(header, export.format, rounded=rounded, mapped=floats)
    return max(made + _logit_bytes(recipe, header), held)


def _consumer_bytes(recipe: Recipe, header: ModelHeader, export: Export | None, outputs: Mapping[str, int]) -> int:
    """Return the bytes that a consumer and the child hold of an artifact, or of the source (None)."""
    whole, logits = 4 * header.parameters, _logit_bytes(recipe, header)
    if export is not None and export.format in GRAPH_FORMATS:
        return TRACED_BYTES + GRAPH_CONSUMER_BYTES + whole + logits
    if export is not None and any(
        options.quantizes for options in recipe.passes
    ):  # the codes, and the floats made from them
        return CONSUMER_BYTES + outputs[export.name] + whole + logits
    mapped = _mapped(header) and (export is None or export.weights is None)
    return CONSUMER_BYTES + whole * (not mapped) + logits


def _bytes_beside_gpu(recipe: Recipe, header: ModelHeader, export: Export | None, outputs: Mapping[str, int]) -> int:
    """As `_bytes`, if the job runs on a GPU. Float weights beside codes are mapped from their file."""
    if recipe.measured_on_gpu(export):
        return CONSUMER_BYTES + GPU_CONSUMER_BYTES + GPU_CHILD_BYTES + _logit_bytes(recipe, header)
    if export is not None and export.format in GRAPH_FORMATS:
        return _bytes(recipe, header, export, outputs)
    whole, logits = 4 * header.parameters, _logit_bytes(recipe, header)
    codes = 0
    if export is not None and any(options.quantizes for options in recipe.passes):
        floats = sum(tensor.size for tensor in header.tensors if not _becomes_codes(recipe, tensor))
        codes = max(0, outputs[export.name] - floats)
    return CONSUMER_BYTES + GPU_CONSUMER_BYTES + codes + whole + logits


def _becomes_codes(recipe: Recipe, tensor: TensorInfo) -> bool:
    return any(options.stored_bytes(tensor) < tensor.size for options in recipe.passes if options.quantizes)


def _logit_bytes(recipe: Recipe, header: ModelHeader) -> int:
    """Return the bytes of an evaluation's largest batch of logits over the vocabulary, with their copies."""
    return int(_LOGIT_COPIES * _batch_bytes(recipe, header))


def _batch_bytes(recipe: Recipe, header: ModelHeader) -> int:
    """Return the bytes of an evaluation's largest batch of logits: of several texts up to a limit, and of one text whatever it takes."""
    if header.task not in {"causal-lm", "masked-lm", "seq2seq"}:
        return 0
    row = 4 * int(header.vocabulary or 0)
    lengths = [
        (min(evaluation.samples, _MOST_ROWS), evaluation.length)
        for evaluation in recipe.evaluate
        if isinstance(evaluation, Quality)
    ]
    return max((max(length * row, min(LOGIT_BYTES, rows * length * row)) for rows, length in lengths), default=0)


def _timed_tokens(recipe: Recipe) -> float:
    """Return the work of one model's timings, in tokens of a forward pass; 0 if the recipe times nothing."""
    return sum(_tokens(evaluation) for evaluation in recipe.evaluate if not isinstance(evaluation, Quality))


def _tokens(evaluation: Evaluation) -> float:
    """Return an evaluation's work, in tokens of a forward pass over many tokens."""
    match evaluation:
        case Quality():
            return evaluation.samples * (
                evaluation.length + evaluation.new_tokens * (evaluation.metric == "generation")
            )
        case Latency():
            shapes = sum(b * n for b in evaluation.batch for n in evaluation.length)
            return shapes * 2 * (evaluation.repeats + 1)  # twice, because an untimed run precedes each timed run
        case GenerationSpeed():
            read = sum(b * n for b in evaluation.batch for n in evaluation.prompt)
            # A decoding step reads every weight for a few tokens, so memory bandwidth limits it at every batch size.
            # One step more: the first tokens of a prompt are decoded untimed before each timed run.
            steps = len(evaluation.batch) * len(evaluation.prompt) * (evaluation.tokens + 1) * _DECODE_STEP
            return (read + steps) * (evaluation.repeats + 1)


def _timed_runs(evaluation: Evaluation) -> int:
    """Return how often an evaluation times a model, with the runs that are not counted."""
    match evaluation:
        case Quality():
            return 0
        case Latency():
            return len(evaluation.batch) * len(evaluation.length) * (evaluation.repeats + 1)
        case GenerationSpeed():
            return len(evaluation.batch) * len(evaluation.prompt) * (evaluation.repeats + 1)
