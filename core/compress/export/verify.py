"""The judgement on what a fresh process saw of an artifact: does it answer as the pressed model does, within its format's bound?"""

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.export.consumer import Observed, Task, consumer_name
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.model.cosines import centred_cosine, whole_cosine
from nightpress.core.compress.runners.measure import pool
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Verification
from nightpress.core.recipes.exports import GRAPH_FORMATS, Export
from nightpress.core.recipes.models import Recipe

#: An fp32 graph computes what the model computes, and a copy the same; only the order of sums differs.
EXACT = 0.9999
#: Rounding may change answers, which the evaluation measures; what falls below these is broken, not rounded.
ROUNDED = {8: 0.9, 7: 0.9, 6: 0.9, 5: 0.7, 4: 0.5}
#: Weights in float16, and in GGUF activations as well.
HALVED = 0.999
#: What the answers to several texts have in common makes every cosine large: less that, an artifact that gives one answer to all of them
#: comes to 0. Rounding of models that hardly tell texts apart comes lower than a format's own bound, but not near 0.
_TELLS_APART = 0.25
_CONSTANT = 1e-3  #: variation, beside the size of the answers, below which a model is taken to give one answer itself
#: GGUF's types, where nothing else was rounded: a random model, which makes most of every error, has 0.9985 in q8_0 and 0.965 in q5_1.
_WRITTEN = {"f32": HALVED, "f16": HALVED, "q8_0": 0.995, "q6_k": 0.97, "q5_k": 0.9, "q5_1": 0.9, "q5_0": 0.9}


def verify(
    recipe: Recipe,
    export: Export,
    observed: Observed,
    *,
    source: Observed,
    traced: Traced | None,
    task: Task,
) -> Verification:
    """Raises NightpressError(verification_failed) when the artifact answers otherwise than it may."""
    ours, theirs = observed.outputs["check.values"], None
    if export.format in GRAPH_FORMATS:
        assert traced is not None
        theirs = _reduce(traced.check, task)
        value = whole_cosine(ours, theirs)
        measure, bound = "cosine of outputs with the pressed model's, in torch", _graph_bound(recipe, export)
    elif (least := _rounding_bound(recipe, export)) is not None:
        theirs = source.outputs["check.values"]
        value = whole_cosine(ours, theirs)
        measure, bound = "cosine of outputs with the source's", least
    else:
        # Pruning and 2 or 3 bits may change the answers at will: that is for the evaluation and the gates.
        value, measure, bound = float(np.isfinite(ours).mean()), "share of outputs that are finite", 1.0
    if value >= bound and theirs is not None:
        varied = _variation(theirs)
        told = centred_cosine(ours, theirs)
        if varied > _CONSTANT and told < _TELLS_APART:
            value, bound = told, _TELLS_APART
            measure += ", less what these have in common"
    passed = value >= bound
    if not passed:
        raise NightpressError(
            ErrorCode.VERIFICATION_FAILED,
            f"The artifact {export.name} was loaded by {consumer_name(observed.versions)}, but answers otherwise than it should: {measure} is {value:.5f}, the bound {bound:g}.",
            hint="Leave sensitive layers to `ignore`, use a gentler pass, or leave this format out of `exports`.",
            artifact=export.name,
            measure=measure,
            value=value,
            bound=bound,
        )
    return Verification(
        consumer=consumer_name(observed.versions),
        passed=passed,
        measure=measure,
        value=value,
        bound=bound,
        seconds=observed.seconds,
        load_snippet=observed.snippet,
    )


def _variation(answers: NDArray[np.float32]) -> float:
    """Of answers to several texts [N, …]: how far they are from their mean, beside their size."""
    whole = answers.astype(np.float64)
    return float(np.linalg.norm(whole - whole.mean(axis=0)) / max(float(np.linalg.norm(whole)), 1e-30))


def _graph_bound(recipe: Recipe, export: Export) -> float:
    # The codes that a pass chose are in the model it is compared with; the runtime rounds activations beside them.
    if any(options.stage in {"graph", "runtime"} or options.quantizes for options in recipe.passes):
        return ROUNDED[8]
    # OpenVINO computes in bfloat16 where the processor can, whatever the weights are stored in.
    return HALVED if export.weights == "fp16" or export.format == "openvino" else EXACT


def _rounding_bound(recipe: Recipe, export: Export) -> float | None:
    """How near the source an artifact must stay that was only rounded. None: the passes may change the answers at will."""
    passes = [options for options in recipe.passes if options.stage != "measure"]
    bounds = [None if options.rounding_bits is None else ROUNDED.get(options.rounding_bits) for options in passes]
    if not passes:
        bounds.append(EXACT)
    if export.format == "gguf" and export.weights is not None:
        bounds.append(_WRITTEN.get(export.weights, ROUNDED[4]))
    known = [bound for bound in bounds if bound is not None]
    # Two passes that only round one after the other are not foreseen.
    return min(known) if known and len(known) == len(bounds) and len(passes) < 2 else None


def _reduce(out: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
    """The model's whole output for the check texts → what a runner keeps of it."""
    check = task.sets[0]
    mask = check.sequences.mask
    if check.kind == "logits":
        return out
    if check.kind == "last":
        last: NDArray[np.float32] = out[np.arange(len(out)), mask.sum(axis=1) - 1]
        return last
    pooled: NDArray[np.float32] = pool(out, mask, task.pooling)
    return pooled
