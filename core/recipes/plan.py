"""Makes a plan from a recipe and a model's header: the steps, the estimate, the queue and warnings. Nothing is run."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from nightpress.core.recipes import measuring
from nightpress.core.recipes.calibration import BUILTIN_DATA
from nightpress.core.recipes.checks import check_exports, check_model, check_order
from nightpress.core.recipes.costs import (
    CONSUMER_BYTES,
    GPU_CONSUMER_BYTES,
    GPU_RATE,
    GPU_RUNTIME_BYTES,
    GPU_START_S,
    MODELLING_BYTES,
    RUNTIME_BYTES,
    Cost,
)
from nightpress.core.recipes.exports import GRAPH_FORMATS, Export
from nightpress.core.recipes.gpu_count import GpuCount, Spread, count_gpus
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.models import Evaluation, GenerationSpeed, Latency, Quality, Recipe, aim
from nightpress.core.recipes.placement import Need, Placement, Queue, Seat, place, threads_of
from nightpress.core.recipes.serving import serving_cost
from nightpress.core.recipes.targets import check_target

#: Task → name of the tied output head's weight, to which patterns of `ignore` apply.
_HEADS = {"causal-lm": "lm_head.weight", "masked-lm": "cls.predictions.decoder.weight"}


class Step(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)

    kind: Literal["pass", "export", "evaluate"]
    name: str
    detail: str


class Leaner(BaseModel):
    """A change to the recipe that lowers its memory."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    change: str
    memory_bytes: int


class Estimate(BaseModel):
    """Bytes and seconds in the plan's queue, estimated from the header alone."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    memory_bytes: int
    disk_bytes: int
    seconds: float
    threads: int  #: number of CPU threads for which `seconds` holds
    output_bytes: dict[str, int]  #: name of an export → bytes of its artifact
    gpu_bytes: int = 0  #: memory of each GPU; 0 on a CPU
    leaner: tuple[Leaner, ...] = ()  #: changes that lower the memory, the smallest change first


class Plan(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)

    recipe: Recipe
    queue: Queue
    queue_reason: str  #: why this queue
    gpus: int = 0  #: GPUs of one host that the job holds; 0 on the queue `cpu`
    gpus_reason: str = ""  #: why so many; empty: the recipe asks for nothing
    steps: tuple[Step, ...]
    warnings: tuple[str, ...]
    estimate: Estimate | None  #: None where no model was named


def make_plan(recipe: Recipe, header: ModelHeader | None = None, fleet: Sequence[Seat] = ()) -> Plan:
    """Check that the passes, exports and model fit together, choose the queue, and estimate memory and time.

    fleet: the workers that were seen lately; `device: auto` depends on them, too. Raises NightpressError: invalid_recipe for a combination
    that can't work, unsupported_architecture for a model that is not known here, malformed_model for a model without a tokenizer.
    """
    if header is not None:
        recipe = aim(recipe, header)
        check_target(recipe.target, header)
    check_order(recipe)
    check_exports(recipe)
    measuring.check_searches(recipe, header)
    estimate = None
    if header is not None:
        check_model(recipe, header)
        vllm = any(seat.vllm for seat in fleet)
        outputs = _outputs(recipe, header)
        costs = _costs(recipe, header, outputs, vllm=vllm)
        queue, reason = _placed(recipe, costs, fleet)
        count = _counted(recipe, costs, fleet) if queue == "gpu" else GpuCount(0, "")
        estimate = _estimate(recipe, header, outputs, costs, count.gpus, fleet, vllm=vllm)
    else:
        queue, reason = _queue_without_model(recipe)
        count = GpuCount(0, "") if queue == "cpu" else _counted_without_model(recipe, fleet)
    warnings = dict.fromkeys(_warnings(recipe, header))
    steps = [Step(kind="pass", name=options.name, detail=options.describe()) for options in recipe.passes]
    steps += [
        Step(kind="export", name=export.name, detail="saved, then loaded by its consumer in a fresh process")
        for export in recipe.exports
    ]
    steps += [
        Step(
            kind="evaluate",
            name=evaluation.metric,
            detail=_evaluation_detail(evaluation),
        )
        for evaluation in recipe.evaluate
    ]
    return Plan(
        recipe=recipe,
        queue=queue,
        queue_reason=reason,
        gpus=count.gpus,
        gpus_reason=count.reason,
        steps=tuple(steps),
        warnings=tuple(warnings),
        estimate=estimate,
    )


def _evaluation_detail(evaluation: Evaluation) -> str:
    match evaluation:
        case Quality():
            return f"on {evaluation.data}"
        case Latency():
            return f"batch {list(evaluation.batch)} × {list(evaluation.length)} tokens"
        case GenerationSpeed():
            return (
                f"batch {list(evaluation.batch)} × prompt {list(evaluation.prompt)}, {evaluation.tokens} tokens written"
            )


def _chain(recipe: Recipe, header: ModelHeader) -> tuple[list[ModelHeader], ModelHeader]:
    """Return the headers of the models that the passes read, one for each pass, and the header of the last pass's result."""
    given = []
    for options in recipe.passes:
        given.append(header)
        header = options.leaves(header)
    return given, header


def _warnings(recipe: Recipe, header: ModelHeader | None) -> Iterable[str]:
    if header is not None and header.brought is not None and not header.brought.weights:
        yield f"config.json says that the model is quantized ({header.brought.method or 'without a method'}), but its weights are floats: the `quantization_config` is left over, and passed over."
    if recipe.wants_several_gpus and not any(options.shared_out for options in recipe.passes):
        yield f"`gpus: {recipe.gpus}`: no pass of the recipe shares out its work, so more than one GPU only speeds up the evaluation."
    if recipe.target == "auto" and header is None:
        yield "`target: auto` looks at the model: name one to see the passes and exports."
    for index, options in enumerate(recipe.passes):
        yield from options.warnings_behind(recipe.passes[:index])
    given = _chain(recipe, header)[0] if header is not None else [None] * len(recipe.passes)
    for options, seen in zip(recipe.passes, given, strict=True):
        yield from options.warnings(seen)
    if header is not None and any(export.format in GRAPH_FORMATS for export in recipe.exports) and header.routes:
        yield "In a graph every expert reads every token, and the router weighs their answers: ONNX and OpenVINO compute more for each token than the model asks for."
    calibrated = [options.name for options in recipe.passes if options.wants == "calibration"]
    if header is not None and (header.sees_images or header.hears):
        used = [evaluation.data for evaluation in recipe.evaluate if isinstance(evaluation, Quality)]
        if any(ref.startswith("builtin:") for ref in (*used, *([recipe.calibration.data] if calibrated else []))):
            what, how = ("sees images", "sees") if header.sees_images else ("hears sounds", "understands speech")
            yield f"The model {what}, and the recipe names none: synthetic ones stand in. Figures on them say how near the result is to its source, not how well it {how}."
    if (
        calibrated
        and recipe.calibration.data
        in {evaluation.data for evaluation in recipe.evaluate if isinstance(evaluation, Quality)} - BUILTIN_DATA
    ):
        yield "The result is measured on the data it was calibrated on: the figures will flatter it."


def stored(recipe: Recipe, header: ModelHeader) -> ModelHeader:
    """Return the header with the bytes in which the passes store each tensor. header: of the float model that the passes leave."""
    passes = [options.settled(header) for options in recipe.passes]
    tensors = [
        replace(tensor, size=min([tensor.size, *(options.stored_bytes(tensor) for options in passes)]))
        for tensor in header.tensors
    ]
    return header.model_copy(update={"tensors": tuple(tensors)})


def _outputs(recipe: Recipe, header: ModelHeader) -> dict[str, int]:
    """Return name of an export → bytes of its artifact."""
    return {export.name: _output_bytes(recipe, header, export) for export in recipe.exports}


def _output_bytes(recipe: Recipe, header: ModelHeader, export: Export) -> int:
    given, left = _chain(recipe, header)
    passes = [options.settled(seen) for options, seen in zip(recipe.passes, given, strict=True)]
    rounded = any(options.stage in {"graph", "runtime"} for options in passes)
    tensors = left.tensors + _further_copies(left, export, rounded=rounded)
    total = 0
    for tensor in tensors:
        size = tensor.size
        for options in passes:
            size = min(size, options.stored_bytes(tensor))
        total += export.stored_bytes(tensor) if size == tensor.size else size
        total += export.text_bytes(tensor)
    return total


def _further_copies(header: ModelHeader, export: Export, *, rounded: bool) -> tuple[TensorInfo, ...]:
    """Return the tensors that an artifact holds once more than the model does. rounded: a graph's pass gives each copy its own codes."""
    if header.task == "seq2seq" and export.format in GRAPH_FORMATS:
        tables = [
            tensor for tensor in header.tensors if len(tensor.shape) == 2 and tensor.shape[0] == header.vocabulary
        ]
        # The encoder and the decoder look tokens up in the same table. Without a head of its own, the decoder also multiplies by it.
        return tuple(tables[:1]) * ((not header.hears) + (rounded and len(tables) == 1))
    if header.tied_table is not None and rounded:
        # A graph holds the tied table twice, for the lookup and for the product, and each copy has its own codes.
        return (replace(header.tied_table, name=_HEADS[header.task]),)
    return ()


def _queue_without_model(recipe: Recipe) -> Placement:
    if recipe.device != "auto":
        return Placement(recipe.device, f"the recipe says `device: {recipe.device}`.")
    if recipe.wants_several_gpus:
        return Placement("gpu", "the recipe asks for several GPUs.")
    if recipe.evaluate_on == "gpu":
        return Placement("gpu", "the recipe says `evaluate_on: gpu`.")
    return Placement("cpu", "`device: auto` looks at the model, and none is named.")


def _placed(recipe: Recipe, costs: Sequence[Cost], fleet: Sequence[Seat]) -> Placement:
    """Return the queue, and the reason for it."""
    if recipe.device != "auto" or recipe.evaluate_on == "gpu" or recipe.wants_several_gpus:
        return _queue_without_model(recipe)
    if recipe.kept_off_gpus:
        return Placement("cpu", f"`{recipe.kept_off_gpus[0]}` runs on a processor alone.")
    # Both estimates use the same number of threads: a GPU worker's larger number of threads is no reason to choose a GPU.
    threads = threads_of(fleet, "cpu" if any(seat.queue == "cpu" for seat in fleet) else "gpu")
    return place(_need(recipe, costs, 0, threads), _need(recipe, costs, 1, threads), fleet)


def _counted(recipe: Recipe, costs: Sequence[Cost], fleet: Sequence[Seat]) -> GpuCount:
    """Return the number of GPUs of a job on the queue `gpu`, and the reason for it."""
    threads = threads_of(fleet, "gpu")
    time = _spread(recipe, costs, threads)
    return count_gpus(recipe.gpus, time, lambda gpus: _need(recipe, costs, gpus, threads), fleet)


def _counted_without_model(recipe: Recipe, fleet: Sequence[Seat]) -> GpuCount:
    if recipe.gpus == "auto":
        return GpuCount(1, "`gpus: auto` looks at the model, and none is named.")
    return count_gpus(recipe.gpus, Spread(0, 0, ()), lambda _: Need(0, 0, 0), fleet)


def _spread(recipe: Recipe, costs: Sequence[Cost], threads: int) -> Spread:
    """Return the time on one GPU, and what of it several GPUs share: the products of the passes that share out their work."""
    spread = [
        (options.name, cost.work / GPU_RATE)
        for options, cost in zip(recipe.passes, costs, strict=False)  # the last cost is that of measuring
        if options.shared_out and options.gate_within is None  # the work of a search is mostly measuring
    ]
    seconds = sum(cost.lasts("gpu", threads) for cost in costs) + GPU_START_S
    return Spread(seconds, sum(time for _, time in spread), tuple(name for name, _ in spread))


def _need(recipe: Recipe, costs: Sequence[Cost], gpus: int, threads: int) -> Need:
    """Return what a job needs on so many GPUs; 0: on a processor."""
    if not gpus:
        return Need(_memory(recipe, costs, 0), 0, sum(cost.lasts("cpu", threads) for cost in costs))
    *passes, measuring = costs
    held = [
        cost.each_gpu(gpus if options.shared_out else 1) for options, cost in zip(recipe.passes, passes, strict=True)
    ]
    each = GPU_RUNTIME_BYTES + max([measuring.gpu_bytes, *held])
    return Need(_memory(recipe, costs, gpus), each, _spread(recipe, costs, threads).on(gpus))


def _estimate(
    recipe: Recipe,
    header: ModelHeader,
    outputs: dict[str, int],
    costs: Sequence[Cost],
    gpus: int,
    fleet: Sequence[Seat],
    *,
    vllm: bool,
) -> Estimate:
    threads = threads_of(fleet, _queue(gpus))
    need = _need(recipe, costs, gpus, threads)
    return Estimate(
        memory_bytes=need.memory_bytes,
        # A search keeps its best candidate beside the one that it tries.
        disk_bytes=header.size * (1 + 2 * recipe.searches)
        + 2 * sum(outputs.values())
        + (header.brought.size if header.brought is not None else 0),
        seconds=round(need.seconds, 1),
        threads=threads,
        output_bytes=outputs,
        gpu_bytes=need.gpu_bytes,
        leaner=tuple(
            choice
            for choice in _leaner(recipe, header, outputs, gpus, vllm=vllm)
            if choice.memory_bytes < need.memory_bytes
        ),
    )


def _costs(recipe: Recipe, header: ModelHeader, outputs: dict[str, int], *, vllm: bool) -> list[Cost]:
    """Return the cost of each pass, and at the end that of measuring. outputs: `_outputs`; vllm: artifacts are run in vLLM, too."""
    given, _ = _chain(recipe, header)
    found = [
        options.cost(seen, recipe.calibration).then(
            measuring.searching_cost(recipe, seen, options.stage, options.tries(seen))
        )
        for options, seen in zip(recipe.passes, given, strict=True)
    ]
    measured = measuring.measuring_cost(recipe, header, outputs, _most(found))
    served = serving_cost(recipe, header) if vllm else None
    return [*found, measured if served is None else measured.then(served)]


def timed_by_turns(recipe: Recipe, header: ModelHeader) -> bool:
    """Return whether the source and an artifact are loaded at the same time and timed by turns. The memory estimate assumes the same."""
    given, _ = _chain(recipe, header)
    passes = [options.cost(seen, recipe.calibration) for options, seen in zip(recipe.passes, given, strict=True)]
    return measuring.timed_by_turns(recipe, header, _outputs(recipe, header), _most(passes))


def timed_uncompressed(recipe: Recipe, header: ModelHeader) -> tuple[Export, ...]:
    """Return the exports of the uncompressed model that are timed beside the artifacts. The estimate assumes the same."""
    given, _ = _chain(recipe, header)
    passes = [options.cost(seen, recipe.calibration) for options, seen in zip(recipe.passes, given, strict=True)]
    return measuring.timed_uncompressed(recipe, header, _outputs(recipe, header), _most(passes))


def _most(costs: Sequence[Cost]) -> int:
    return max((cost.memory_bytes for cost in costs), default=0)


def _queue(gpus: int) -> Queue:
    return "gpu" if gpus else "cpu"


def _memory(recipe: Recipe, costs: Sequence[Cost], gpus: int) -> int:
    """Return the bytes of the host's memory on so many GPUs; 0: on a processor."""
    *passes, measuring = (cost.held(_queue(gpus)) for cost in costs)
    if gpus and _kept(
        recipe
    ):  # torch never frees pinned memory, so the child still holds it while artifacts are measured
        return RUNTIME_BYTES + _kept(recipe) + max(passes) + measuring + (gpus - 1) * _another_process(recipe, passes)
    return RUNTIME_BYTES + _kept(recipe) + max([measuring, *passes])


def _another_process(recipe: Recipe, passes: Sequence[int]) -> int:
    """Return the bytes of each process beside the first, at most: what the first holds in a pass, or a consumer that runs examples."""
    shared = [held for options, held in zip(recipe.passes, passes, strict=True) if options.shared_out]
    pressing = RUNTIME_BYTES + _kept(recipe) + max(shared) if shared else 0
    return max(pressing, CONSUMER_BYTES + GPU_CONSUMER_BYTES)


def _kept(recipe: Recipe) -> int:
    """Return the bytes that stay in the child after passes have run the model. The child still holds them while artifacts are measured."""
    return MODELLING_BYTES if {options.scope for options in recipe.passes} & {"blocks", "train"} else 0


def _leaner(recipe: Recipe, header: ModelHeader, outputs: dict[str, int], gpus: int, *, vllm: bool) -> Iterable[Leaner]:
    """Yield recipes with less calibration text: first fewer samples, then also shorter samples. Options of the passes are not changed."""
    given = recipe.calibration
    for share in (2, 4, 8):
        if given.samples >= 8 * share:
            yield _with_calibration(
                recipe, header, outputs, gpus, samples=given.samples // share, length=given.length, vllm=vllm
            )
    for share in (2, 4):
        if given.samples >= 64 and given.length >= 128 * share:
            yield _with_calibration(
                recipe, header, outputs, gpus, samples=given.samples // 8, length=given.length // share, vllm=vllm
            )


def _with_calibration(
    recipe: Recipe,
    header: ModelHeader,
    outputs: dict[str, int],
    gpus: int,
    *,
    samples: int,
    length: int,
    vllm: bool,
) -> Leaner:
    calibration = recipe.calibration.model_copy(update={"samples": samples, "length": length})
    leaner = recipe.model_copy(update={"calibration": calibration})
    memory = _memory(leaner, _costs(leaner, header, outputs, vllm=vllm), gpus)
    return Leaner(change=f"`calibration: {{samples: {samples}, length: {length}}}`", memory_bytes=memory)
