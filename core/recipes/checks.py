"""Checks whether the passes, exports, measurements and the model of a plan fit together. Each error says what to do."""

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.classes import why_not_measured
from nightpress.core.recipes.exceptions import why_not, why_not_by_blocks
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.llama_converter import by_converter
from nightpress.core.recipes.models import GenerationSpeed, Quality, Recipe
from nightpress.core.recipes.passes import PassOptions


def check_order(recipe: Recipe) -> None:
    """Check that the passes can follow one another. Raises NightpressError: invalid_recipe."""
    for index, options in enumerate(recipe.passes[:-1]):
        if options.last and not recipe.passes[index + 1].reads_codes:
            raise invalid(
                f"passes.{index + 1}: nothing can follow `{options.name}`, because its result is no longer a float model.",
                f"Move `{options.name}` to the end, or give the two their own recipes.",
            )
    for index, options in enumerate(recipe.passes):
        if options.stage == "source" and index:
            raise invalid(
                f"passes.{index + 1}: `{options.name}` says how the source is read.", "Make it the first pass."
            )
    for options in recipe.passes:
        options.check_beside(recipe.passes, None)


def check_exports(recipe: Recipe) -> None:
    """Check that the exports and devices fit the passes, whatever the model is. Raises NightpressError: invalid_recipe."""
    for options in recipe.passes:
        _check_carriers(recipe, options, None)
        on_gpu = recipe.wants_several_gpus or "gpu" in {recipe.device, recipe.evaluate_on}
        if on_gpu and options.name in recipe.kept_off_gpus:
            raise invalid(
                f"`{options.name}` runs on a CPU only.", "Leave `device` and `evaluate_on` at `auto`, and `gpus` out."
            )
    if recipe.wants_several_gpus and recipe.device == "cpu":
        raise invalid(f"gpus: a job with `device: cpu` has no {recipe.gpus} GPUs.", "Leave `device` at `auto`.")
    if recipe.evaluate_on == "gpu":
        if recipe.device == "cpu":
            raise invalid("evaluate_on: a job with `device: cpu` has no GPU.", "Leave `device` at `auto`.")
        if not recipe.measured_on_gpu(None):
            names = ", ".join(export.name for export in recipe.exports)
            raise invalid(
                f"evaluate_on: nothing that this recipe exports runs on a GPU here ({names}).",
                "Leave `evaluate_on` at `auto`, or export `safetensors` or `compressed-tensors`.",
            )
    if any(export.format == "compressed-tensors" for export in recipe.exports) and not any(
        options.quantizes for options in recipe.passes
    ):
        raise invalid(
            "exports: compressed-tensors needs a quantizing pass.",
            "Add `weight-only` or `gptq`, or export `safetensors`.",
        )


def check_pass(options: PassOptions, header: ModelHeader) -> None:
    """Raise NightpressError(invalid_recipe) if a pass can't take a model."""
    if header.hears and options.stage == "folder" and options.wants != "nothing":
        raise invalid(
            f"`{options.name}` learns from texts or images, and a {header.architecture} hears.",
            "Use `dynamic-int8` or `static-int8` in ONNX or OpenVINO, or a pass that needs no data, such as `weight-only`.",
        )
    if (why := why_not(options.name, header)) is not None:
        raise invalid(f"`{options.name}` can't take a {header.model_type}: {why}.", "Leave it out.")
    if options.scope == "blocks" and (why := why_not_by_blocks(header)) is not None:
        raise invalid(
            f"`{options.name}` runs a model block by block, and can't take a {header.model_type}: {why}.",
            "Use `weight-only` or `magnitude`, which need no calibration.",
        )
    options.check(header)


def _check_carriers(recipe: Recipe, options: PassOptions, header: ModelHeader | None) -> None:
    carriers = options.carriers(header)
    wrong = [export.name for export in recipe.exports if export.carrier not in carriers]
    if wrong:
        why = options.why_not(header)
        raise invalid(
            f"exports: {', '.join(wrong)} can't carry the result of `{options.name}`{': ' + why if why else ''}.",
            f"Use {' or '.join(sorted(carriers))} with it.",
        )


def check_model(recipe: Recipe, header: ModelHeader) -> None:
    """Check that the recipe's passes, exports and measurements fit a model.

    Raises NightpressError: invalid_recipe, unsupported_architecture for a model that can't be measured, malformed_model for one without a
    tokenizer.
    """
    if (why := why_not_measured(header.architecture, header.model_type)) is not None:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"The model is a {header.architecture or 'model without a named class'} of type {header.model_type!r}: {why[0]}.",
            hint=why[1],
            model_type=header.model_type,
        )
    if not header.has_tokenizer and not header.sees_images:
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL,
            "The model has no tokenizer, so nothing can be measured on text.",
            hint="Add tokenizer.json (and tokenizer_config.json) to its folder.",
        )
    if (
        header.brought is not None
        and header.brought.weights
        and not any(options.stage == "source" for options in recipe.passes)
    ):
        raise invalid(
            f"The model is quantized already: {header.brought.detail}.",
            "Bring the float model it was made from. Or begin the recipe's `passes` with `{pass: requantize}`: it decodes the model, and everything is compared with what was brought.",
        )
    seen = header
    for options in recipe.passes:
        check_pass(options, seen)
        _check_carriers(recipe, options, seen)
        seen = options.leaves(seen)
    for options in recipe.passes:
        options.check_beside(recipe.passes, header)
    for export in recipe.exports:
        export.check(header)
        if export.format == "gguf" and by_converter(header):
            _check_floats(recipe, header)
    for wanted in recipe.evaluate:
        if isinstance(wanted, Quality):
            if (header.sees_images or header.hears) and wanted.part != "all":
                what = "images" if header.sees_images else "sounds"
                raise invalid(f"evaluate: {what} are not divided into parts.", "Leave `part` out.")
            _check_metric(wanted, header)
        elif isinstance(wanted, GenerationSpeed):
            _check_generation(wanted, header)
        elif header.one_text_a_batch and max(wanted.batch) > 1:
            raise invalid(
                "evaluate: the model takes no batch of several texts: it finds a text's end by its padding token, and its config.json names none.",
                "Use `batch: 1`, or give config.json the `pad_token_id` that the model was trained with.",
            )


def _check_floats(recipe: Recipe, header: ModelHeader) -> None:
    """Check that the passes leave floats, since llama.cpp's converter reads no codes."""
    coding = next((options for options in recipe.passes if options.last), None)
    if coding is not None:
        raise invalid(
            f"exports: gguf can't carry the result of `{coding.name}`: a {header.model_type} is written by llama.cpp's converter, which reads floats.",
            f"Leave `{coding.name}` out, and give the export a type: `{{format: gguf, type: q4_k}}`.",
        )


def _check_generation(speed: GenerationSpeed, header: ModelHeader) -> None:
    if header.task not in {"causal-lm", "seq2seq"}:
        raise invalid(
            f"evaluate: {speed.metric} is for models that write text, and this one is for {header.task}.",
            "Use `latency`.",
        )
    longest = max(speed.prompt) + speed.tokens
    if header.positions is not None and longest > header.positions:
        raise invalid(
            f"evaluate: {speed.metric} would come to {longest} tokens, more than the model's {header.positions} positions.",
            "Use a shorter `prompt` or fewer `tokens`.",
        )


#: Metric → (tasks of the models that it is for, whether prose is enough data for it).
_METRICS: dict[str, tuple[frozenset[str], bool]] = {
    "perplexity": (frozenset({"causal-lm"}), True),
    "generation": (frozenset({"causal-lm", "seq2seq"}), True),
    "multiple-choice": (frozenset({"causal-lm"}), False),
    "masked-lm": (frozenset({"masked-lm"}), True),
    "accuracy": (frozenset({"classification"}), False),
    "regression": (frozenset({"classification"}), False),
    "entities": (frozenset({"token-classification"}), False),
    "similarity": (frozenset({"embedding"}), False),
    "retrieval": (frozenset({"embedding"}), True),
    "neighbours": (frozenset({"embedding"}), True),
    "ranking": (frozenset({"classification"}), True),
}


def _check_metric(quality: Quality, header: ModelHeader) -> None:
    if quality.metric not in _METRICS:
        return
    tasks, prose = _METRICS[quality.metric]
    if header.task not in tasks:
        others = [name for name, (takes, _) in _METRICS.items() if header.task in takes]
        raise invalid(
            f"evaluate: {quality.metric} is for {' and '.join(sorted(tasks))} models, and this one is for {header.task}.",
            f"Use {', '.join(f'`{name}`' for name in ['auto', *others, 'fidelity'])}.",
        )
    if quality.metric in {"accuracy", "regression"} and (quality.metric == "regression") != (header.head == "numbers"):
        what = "answer with numbers" if quality.metric == "regression" else "choose among classes"
        raise invalid(
            f"evaluate: {quality.metric} is for models that {what}, and this one's outputs are {header.head} (`problem_type` and `num_labels` in its config.json).",
            f"Use `{'regression' if header.head == 'numbers' else 'accuracy'}` or `fidelity`.",
        )
    if header.sees_images and (
        quality.metric == "regression" or (quality.metric, header.head) == ("accuracy", "labels")
    ):
        raise invalid(
            "evaluate: of images, only models that choose one class are measured against labels.", "Use `fidelity`."
        )
    if quality.metric == "ranking" and header.classes != 1:
        raise invalid(
            f"evaluate: ranking orders documents by one score, and this model answers {header.classes} numbers.",
            "Use `accuracy` or `fidelity`.",
        )
    if not prose and quality.data.startswith("builtin:"):
        raise invalid(
            f"evaluate: {quality.metric} needs a data set with the columns that docs/evaluation.md names; {quality.data} is prose.",
            "Name a data set in `data`, or use `fidelity`, which needs no labels.",
        )
