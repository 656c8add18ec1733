"""From a recipe and a model's header to a plan: the steps, what they cost, and what speaks against them. Nothing runs here."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from core.errors import ErrorCode, NightpressError
from core.recipes.costs import (
    CONSUMER_BYTES,
    FORWARD_RATE,
    GPU_RATE,
    GRAPH_CONSUMER_BYTES,
    LOGIT_BYTES,
    MODELLING_BYTES,
    RUNTIME_BYTES,
    TRACED_BYTES,
    Cost,
    cached_trace_seconds,
    made_graph_bytes,
)
from core.recipes.exports import GRAPH_FORMATS, Export
from core.recipes.header import DECODERS, ENCODER_DECODERS, ENCODERS, MIXTURES, VISION, ModelHeader
from core.recipes.linears import invalid
from core.recipes.models import Evaluation, GenerationSpeed, Latency, Quality, Recipe, aim
from core.recipes.passes import DynamicInt8, EarlyExit, GenerationCache, PassOptions, Recover
from core.recipes.targets import check_target

_IMPORT_S = 3.5  #: start of one consumer process with torch and transformers
_GRAPH_S = 4.0  #: tracing, and the start of a consumer with a graph runtime alone
_DECODE_STEP = 10  #: how many tokens of a long forward pass take as long as decoding one
_LOGIT_COPIES = 2.2  #: of a batch's logits: their logarithms, and what is compared
_MOST_ROWS = 16  #: of a batch
#: what the head is called that multiplies by the table, for `ignore`
_HEADS = {"causal-lm": "lm_head.weight", "masked-lm": "cls.predictions.decoder.weight"}
_CUT_BACK = frozenset({"none", "dynamic"})  #: caches from which tokens can be taken back


class Step(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)

    kind: Literal["pass", "export", "evaluate"]
    name: str
    detail: str


class Leaner(BaseModel):
    """A change to the recipe with which it takes less memory."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    change: str
    memory_bytes: int


class Estimate(BaseModel):
    """Bytes and seconds, from the header alone."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    memory_bytes: int
    disk_bytes: int
    seconds: float
    output_bytes: dict[str, int]  #: by export format
    gpu_bytes: int = 0  #: of a GPU's memory; 0 on a CPU
    leaner: tuple[Leaner, ...] = ()  #: the nearest first


class Plan(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)

    recipe: Recipe
    queue: Literal["cpu", "gpu"]
    steps: tuple[Step, ...]
    warnings: tuple[str, ...]
    estimate: Estimate | None  #: None where no model was named


def make_plan(recipe: Recipe, header: ModelHeader | None = None) -> Plan:
    """Check that the passes, exports and model go together, and say what it will take.

    Raises NightpressError: invalid_recipe for a combination that can't work, unsupported_architecture for a model no pass or evaluation here knows.
    """
    if header is not None:
        recipe = aim(recipe, header)
        check_target(recipe.target, header)
    _check_order(recipe)
    _check_exports(recipe)
    estimate = None
    if header is not None:
        _check_model(recipe, header)
        estimate = _estimate(recipe, header)
    warnings = dict.fromkeys(_warnings(recipe, header))
    steps = [Step(kind="pass", name=one.pass_, detail=one.describe()) for one in recipe.passes]
    steps += [
        Step(kind="export", name=one.name, detail="saved, then loaded by its consumer in a fresh process")
        for one in recipe.exports
    ]
    steps += [
        Step(
            kind="evaluate",
            name=one.metric,
            detail=_evaluation_detail(one),
        )
        for one in recipe.evaluate
    ]
    return Plan(
        recipe=recipe,
        queue="gpu" if recipe.device == "gpu" else "cpu",
        steps=tuple(steps),
        warnings=tuple(warnings),
        estimate=estimate,
    )


def _evaluation_detail(one: Evaluation) -> str:
    match one:
        case Quality():
            return f"on {one.data}"
        case Latency():
            return f"batch {list(one.batch)} × {list(one.length)} tokens"
        case GenerationSpeed():
            return f"batch {list(one.batch)} × prompt {list(one.prompt)}, {one.tokens} tokens written"


def _check_order(recipe: Recipe) -> None:
    for index, one in enumerate(recipe.passes[:-1]):
        if one.last:
            raise invalid(
                f"passes.{index + 1}: nothing can follow `{one.pass_}`, because its result is no longer a float model.",
                f"Move `{one.pass_}` to the end, or give the two their own recipes.",
            )
    cut = [one.pass_ for one in recipe.passes if isinstance(one, GenerationCache) and one.mode not in _CUT_BACK]
    if cut and any(isinstance(one, EarlyExit) for one in recipe.passes):
        raise invalid(
            "`early-exit` drafts tokens and takes wrong ones back, which needs a cache that can be cut back.",
            "Use `generation-cache` with `mode: dynamic`, or give the two their own recipes.",
        )


def _check_exports(recipe: Recipe) -> None:
    for one in recipe.passes:
        _check_carriers(recipe, one, None)
        if recipe.device == "gpu" and "cuda" not in one.runs_on:
            raise invalid(f"`{one.pass_}` runs on a CPU only.", "Leave `device` at `auto`.")
    if any(one.format == "compressed-tensors" for one in recipe.exports) and not any(
        one.quantizes for one in recipe.passes
    ):
        raise invalid(
            "exports: compressed-tensors needs a quantizing pass.",
            "Add `weight-only` or `gptq`, or export `safetensors`.",
        )


def _check_carriers(recipe: Recipe, one: PassOptions, header: ModelHeader | None) -> None:
    carriers = one.carriers(header)
    wrong = [export.name for export in recipe.exports if export.carrier not in carriers]
    if wrong:
        why = one.why_not(header)
        raise invalid(
            f"exports: {', '.join(wrong)} can't carry the result of `{one.name}`{': ' + why if why else ''}.",
            f"Use {' or '.join(sorted(carriers))} with it.",
        )


def _chain(recipe: Recipe, header: ModelHeader) -> tuple[list[ModelHeader], ModelHeader]:
    """What each pass is given, and what the last one leaves."""
    given = []
    for one in recipe.passes:
        given.append(header)
        header = one.leaves(header)
    return given, header


def _warnings(recipe: Recipe, header: ModelHeader | None) -> Iterable[str]:
    if recipe.target == "auto" and header is None:
        yield "`target: auto` looks at the model: name one to see the passes and exports."
    if recipe.passes and isinstance(recipe.passes[0], Recover):
        yield "`recover` comes first, so that the model's teacher is the model itself: put it behind what takes something away."
    given = _chain(recipe, header)[0] if header is not None else [None] * len(recipe.passes)
    for one, seen in zip(recipe.passes, given, strict=True):
        yield from one.warnings(seen)
    calibrated = [one.pass_ for one in recipe.passes if one.wants == "calibration"]
    if header is not None and header.sees_images:
        used = [one.data for one in recipe.evaluate if isinstance(one, Quality)]
        if any(ref.startswith("builtin:") for ref in (*used, *([recipe.calibration.data] if calibrated else []))):
            yield "The model sees images, and the recipe names none: synthetic ones stand in. Figures on them say how near the result is to its source, not how well it sees."
    if calibrated and recipe.calibration.data in {one.data for one in recipe.evaluate if isinstance(one, Quality)} - {
        "builtin:prose"
    }:
        yield "The result is measured on the data it was calibrated on: the figures will flatter it."


def _check_model(recipe: Recipe, header: ModelHeader) -> None:
    known = ENCODERS | DECODERS | ENCODER_DECODERS | VISION
    alone = header.model_type in ENCODER_DECODERS and header.task != "seq2seq"
    if header.model_type not in known or header.task == "other" or alone:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"The model is a {header.architecture or 'model without a named class'} of type {header.model_type!r}, which cannot be evaluated and exported here yet.",
            hint="Of encoder-decoders only whole ones with the head ForConditionalGeneration are known."
            if alone
            else f"Known types: {', '.join(sorted(known))}.",
            model_type=header.model_type,
        )
    if not header.has_tokenizer and not header.sees_images:
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL,
            "The model has no tokenizer, so nothing can be measured on text.",
            hint="Add tokenizer.json (and tokenizer_config.json) to its folder.",
        )
    seen = header
    for one in recipe.passes:
        one.check(seen)
        _check_carriers(recipe, one, seen)
        seen = one.leaves(seen)
    _check_cached_mixture(recipe, header)
    for export in recipe.exports:
        export.check(header)
    for wanted in recipe.evaluate:
        if isinstance(wanted, Quality):
            _check_metric(wanted, header)
        elif isinstance(wanted, GenerationSpeed):
            _check_generation(wanted, header)


def _check_cached_mixture(recipe: Recipe, header: ModelHeader) -> None:
    """With a description of quantized weights that names none, transformers looks in vain for the experts' scheme."""
    names = {one.pass_ for one in recipe.passes}
    if "kv-cache" in names and header.model_type in MIXTURES and not any(one.last for one in recipe.passes):
        raise invalid(
            "`kv-cache` alone can't take a mixture of experts: transformers takes its experts for codes, and they stay in float.",
            "Let a pass that quantizes the weights follow, e.g. `gptq`.",
        )


def _check_generation(one: GenerationSpeed, header: ModelHeader) -> None:
    if header.task not in {"causal-lm", "seq2seq"}:
        raise invalid(
            f"evaluate: {one.metric} is for models that write text, and this one is for {header.task}.",
            "Use `latency`.",
        )
    longest = max(one.prompt) + one.tokens
    if header.positions is not None and longest > header.positions:
        raise invalid(
            f"evaluate: {one.metric} would come to {longest} tokens, more than the model's {header.positions} positions.",
            "Use a shorter `prompt` or fewer `tokens`.",
        )


#: metric → the tasks whose models it is for, and whether prose is enough for it
_METRICS: dict[str, tuple[frozenset[str], bool]] = {
    "perplexity": (frozenset({"causal-lm"}), True),
    "generation": (frozenset({"causal-lm"}), True),
    "multiple-choice": (frozenset({"causal-lm"}), False),
    "masked-lm": (frozenset({"masked-lm"}), True),
    "accuracy": (frozenset({"classification"}), False),
    "entities": (frozenset({"token-classification"}), False),
    "similarity": (frozenset({"embedding"}), False),
    "retrieval": (frozenset({"embedding"}), True),
}


def _check_metric(one: Quality, header: ModelHeader) -> None:
    if one.metric not in _METRICS:
        return
    tasks, prose = _METRICS[one.metric]
    if header.task not in tasks:
        others = [name for name, (takes, _) in _METRICS.items() if header.task in takes]
        raise invalid(
            f"evaluate: {one.metric} is for {' and '.join(sorted(tasks))} models, and this one is for {header.task}.",
            f"Use {', '.join(f'`{name}`' for name in ['auto', *others, 'fidelity'])}.",
        )
    if not prose and one.data.startswith("builtin:"):
        raise invalid(
            f"evaluate: {one.metric} needs a data set with the columns that docs/evaluation.md names; {one.data} is prose.",
            "Name a data set in `data`, or use `fidelity`, which needs no labels.",
        )


def stored(recipe: Recipe, header: ModelHeader) -> ModelHeader:
    """The header of the float model that the passes leave, with the sizes that its tensors are stored in."""
    passes = [one.settled(header) for one in recipe.passes]
    tensors = [
        tensor.model_copy(update={"size": min([tensor.size, *(one.stored_bytes(tensor) for one in passes)])})
        for tensor in header.tensors
    ]
    return header.model_copy(update={"tensors": tuple(tensors)})


def _output_bytes(recipe: Recipe, header: ModelHeader, export: Export) -> int:
    given, left = _chain(recipe, header)
    passes = [one.settled(seen) for one, seen in zip(recipe.passes, given, strict=True)]
    tensors = left.tensors
    if left.tied_table is not None and any(one.scope == "graph" for one in passes):
        # Rows of the one are looked up, columns of the other multiplied by, and each has codes of its own.
        tensors += (left.tied_table.model_copy(update={"name": _HEADS[left.task]}),)
    total = 0
    for tensor in tensors:
        size = tensor.size
        for one in passes:
            size = min(size, one.stored_bytes(tensor))
        total += export.stored_bytes(tensor) if size == tensor.size else size
        total += export.text_bytes(tensor)
    return total


def _estimate(recipe: Recipe, header: ModelHeader) -> Estimate:
    outputs = {export.name: _output_bytes(recipe, header, export) for export in recipe.exports}
    costs = _costs(recipe, header)
    memory = _memory(recipe, costs)
    on_gpu = recipe.device == "gpu"
    rate = GPU_RATE if on_gpu else FORWARD_RATE
    return Estimate(
        memory_bytes=memory,
        disk_bytes=header.size + 2 * sum(outputs.values()),
        seconds=round(sum(one.seconds + one.work / rate for one in costs), 1),
        output_bytes=outputs,
        gpu_bytes=max(one.gpu_bytes for one in costs) if on_gpu else 0,
        leaner=tuple(one for one in _leaner(recipe, header) if one.memory_bytes < memory),
    )


def _costs(recipe: Recipe, header: ModelHeader) -> list[Cost]:
    given, _ = _chain(recipe, header)
    found = [one.cost(seen, recipe.calibration) for one, seen in zip(recipe.passes, given, strict=True)]
    return [*found, _measuring_cost(recipe, header)]


def _memory(recipe: Recipe, costs: list[Cost]) -> int:
    return RUNTIME_BYTES + _kept(recipe) + max(one.memory_bytes for one in costs)


def _kept(recipe: Recipe) -> int:
    """What the passes leave in the child once it has run a model: it is there while the artifacts are measured, too."""
    return MODELLING_BYTES if {one.scope for one in recipe.passes} & {"blocks", "train"} else 0


def _leaner(recipe: Recipe, header: ModelHeader) -> Iterable[Leaner]:
    """Fewer samples, then shorter ones: what is asked of the text is given up before what is asked of the model."""
    given = recipe.calibration
    for share in (2, 4, 8):
        if given.samples >= 8 * share:
            yield _with_calibration(recipe, header, samples=given.samples // share, length=given.length)
    for share in (2, 4):
        if given.samples >= 64 and given.length >= 128 * share:
            yield _with_calibration(recipe, header, samples=given.samples // 8, length=given.length // share)


def _with_calibration(recipe: Recipe, header: ModelHeader, *, samples: int, length: int) -> Leaner:
    calibration = recipe.calibration.model_copy(update={"samples": samples, "length": length})
    leaner = recipe.model_copy(update={"calibration": calibration})
    memory = _memory(leaner, _costs(leaner, header))
    return Leaner(change=f"`calibration: {{samples: {samples}, length: {length}}}`", memory_bytes=memory)


def _measuring_cost(recipe: Recipe, header: ModelHeader) -> Cost:
    """The source and each artifact, loaded in a process of its own and run on every evaluation."""
    tokens = sum(_tokens(one) for one in recipe.evaluate)
    starts = [_IMPORT_S, *(_GRAPH_S if one.format in GRAPH_FORMATS else _IMPORT_S for one in recipe.exports)]
    traced = any(one.format in GRAPH_FORMATS for one in recipe.exports)  # a trace serves all of them
    seconds = (
        sum(starts) + traced * cached_trace_seconds(header) + len(starts) * tokens * header.parameters / FORWARD_RATE
    )
    return Cost(max(_measuring_bytes(recipe, header, export) for export in (None, *recipe.exports)), seconds)


def _measuring_bytes(recipe: Recipe, header: ModelHeader, export: Export | None) -> int:
    """What a consumer holds of an artifact or the source (None), with what the child holds of it. Weights in fp32 are mapped from their file."""
    whole, logits = 4 * header.parameters, _logit_bytes(recipe, header)
    floats = all(tensor.dtype == "F32" for tensor in header.tensors)
    codes = any(one.quantizes for one in recipe.passes)
    if export is not None and export.format in GRAPH_FORMATS:
        rounded = any(isinstance(one, DynamicInt8) for one in recipe.passes)
        made = made_graph_bytes(header, export.format, rounded=rounded, mapped=floats and not codes)
        return max(made + logits, TRACED_BYTES + GRAPH_CONSUMER_BYTES + whole + logits)
    if export is not None and codes:  # the codes, and what they become
        return CONSUMER_BYTES + _output_bytes(recipe, header, export) + whole + logits
    mapped = floats and (export is None or export.weights is None)
    return CONSUMER_BYTES + whole * (not mapped) + logits


def _logit_bytes(recipe: Recipe, header: ModelHeader) -> int:
    """Of the largest batch of an evaluation, over the vocabulary."""
    if header.task not in {"causal-lm", "masked-lm"}:
        return 0
    row = 4 * int(header.config.get("vocab_size") or 0)
    lengths = [(min(one.samples, _MOST_ROWS), one.length) for one in recipe.evaluate if isinstance(one, Quality)]
    return int(_LOGIT_COPIES * max((min(LOGIT_BYTES, rows * length * row) for rows, length in lengths), default=0))


def _tokens(one: Evaluation) -> float:
    """Tokens of one evaluation, each as long as one of many in a forward pass."""
    match one:
        case Quality():
            return one.samples * (one.length + one.new_tokens * (one.metric == "generation"))
        case Latency():
            return sum(b * n for b in one.batch for n in one.length) * (one.repeats + 3)
        case GenerationSpeed():
            read = sum(b * n for b in one.batch for n in one.prompt)
            # A step reads every weight for few tokens: it waits for memory, whatever the batch.
            steps = len(one.batch) * len(one.prompt) * one.tokens * _DECODE_STEP
            return (read + steps) * (one.repeats + 1)
