"""The verification of an artifact: are its outputs in a fresh process those of the pressed model, within the bound of its format?"""

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.export.consumer import Observed, consumer_name
from nightpress.core.compress.export.probes import ProbeResult
from nightpress.core.compress.export.task import Task
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.model.cosines import centred_cosine, whole_cosine
from nightpress.core.compress.runners.measure import pool
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Verification
from nightpress.core.recipes.exports import GRAPH_FORMATS, Export
from nightpress.core.recipes.models import Recipe

#: Least cosine of an fp32 graph or of a copy: both compute what the model computes. Only the order of sums differs.
EXACT = 0.9999
#: Bits → least cosine after rounding. Rounding may change answers, and the evaluation measures this. Below the bound an artifact is broken.
ROUNDED = {8: 0.9, 7: 0.9, 6: 0.9, 5: 0.7, 4: 0.5}
#: Least cosine with weights in float16. GGUF has activations in float16, too.
HALVED = 0.999
#: Least cosine after subtracting the mean of the answers. Answers to different texts have a common part that makes every cosine large.
#: Without it, an artifact that gives the same answer to all texts has a cosine of 0. Rounded models that hardly distinguish texts can be
#: below their format's own bound, but not near 0.
_TELLS_APART = 0.25
_CONSTANT = 1e-3  #: variation relative to the size of the answers; below it, the model itself is taken to give the same answer always
#: Least cosine with a source that was computed in 16 bits on a GPU, for an artifact that computes on the processor
_ACROSS = 0.995
#: GGUF's type → least cosine if nothing else was rounded. A model with random weights, where errors are largest, has 0.9985 in q8_0 and
#: 0.965 in q5_1.
_WRITTEN: dict[str, float | None] = {
    **dict.fromkeys(("f32", "f16"), HALVED),
    "q8_0": 0.995,
    "q6_k": 0.97,
    **dict.fromkeys(("q5_k", "q5_1", "q5_0"), 0.9),
    **dict.fromkeys(("q2_k", "q3_k")),  # no bound, as for passes at 2 and 3 bits
}


def verify(
    recipe: Recipe,
    export: Export,
    observed: Observed,
    *,
    source: Observed,
    traced: Traced | None,
    task: Task,
    probes: ProbeResult | None = None,
) -> Verification:
    """Compare an artifact's outputs with those of the pressed model or of the source.

    observed, source: the outputs of the artifact's and of the source's process. traced: needed for graph formats. probes: the comparison of
    single layers, where there is one. Raises NightpressError(verification_failed) if the outputs, or those of a layer, differ by more than
    their bound.
    """
    ours, theirs = observed.outputs["check.values"], None
    if export.format in GRAPH_FORMATS:
        assert traced is not None
        theirs = _reduce(traced.check, task)
        value = whole_cosine(ours, theirs)
        measure, bound = "cosine of outputs with the pressed model's, in torch", _graph_bound(recipe, export)
    elif (least := _rounding_bound(recipe, export)) is not None:
        theirs = source.outputs["check.values"]
        value = whole_cosine(ours, theirs)
        across = observed.loaded_as["device"] != source.loaded_as["device"]
        measure, bound = "cosine of outputs with the source's", min(least, _ACROSS) if across else least
    else:
        # Pruning and 2 or 3 bits may change the answers without limit. The evaluation and the gates decide about that.
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
    if probes is not None and not probes.error <= probes.bound:
        raise NightpressError(
            ErrorCode.VERIFICATION_FAILED,
            f"The artifact {export.name} was loaded by {consumer_name(observed.versions)}, but its layer {probes.worst} multiplies by other weights than it should: the relative error of its answers is {probes.error:.4f}, the bound {probes.bound:g}.",
            hint="The library reads the stored weights otherwise than they were written. Use another version of it, or another export.",
            artifact=export.name,
            layer=probes.worst,
            value=probes.error,
            bound=probes.bound,
        )
    return Verification(
        consumer=consumer_name(observed.versions),
        layers=probes.layers if probes else None,
        layer_error=probes.error if probes else None,
        passed=passed,
        measure=measure,
        value=value,
        bound=bound,
        seconds=observed.seconds,
        load_snippet=observed.snippet,
    )


def _variation(answers: NDArray[np.float32]) -> float:
    """The distance of several texts' answers [N, …] from their mean, relative to the size of the answers."""
    whole = answers.astype(np.float64)
    return float(np.linalg.norm(whole - whole.mean(axis=0)) / max(float(np.linalg.norm(whole)), 1e-30))


def _graph_bound(recipe: Recipe, export: Export) -> float:
    # The model that the graph is compared with has the same codes. But the runtime also rounds activations.
    if any(options.stage in {"graph", "runtime"} or options.quantizes for options in recipe.passes):
        return ROUNDED[8]
    # OpenVINO computes in bfloat16 if the processor can, for any dtype of the stored weights.
    return HALVED if export.weights == "fp16" or export.format == "openvino" else EXACT


def _rounding_bound(recipe: Recipe, export: Export) -> float | None:
    """The least cosine with the source for an artifact that was only rounded. None: the passes may change the answers without limit."""
    passes = [options for options in recipe.passes if options.stage not in {"measure", "source"} and options.relation]
    bounds = [None if options.rounding_bits is None else ROUNDED.get(options.rounding_bits) for options in passes]
    if not passes:
        bounds.append(EXACT)
    if export.format == "gguf" and export.weights is not None:
        bounds.append(_WRITTEN.get(export.weights, ROUNDED[4]))
    known = [bound for bound in bounds if bound is not None]
    # There is no bound for two rounding passes, one after the other.
    return min(known) if known and len(known) == len(bounds) and len(passes) < 2 else None


def _reduce(out: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
    """Reduce the model's whole output for the check texts to the part that a runner keeps."""
    check = task.sets[0]
    mask = check.sequences.mask
    if check.kind in {"logits", "steps"}:
        return out
    if check.kind == "last":
        last: NDArray[np.float32] = out[np.arange(len(out)), mask.sum(axis=1) - 1]
        return last
    pooled: NDArray[np.float32] = pool(out, mask, task.pooling)
    return pooled
