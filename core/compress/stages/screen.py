"""The stage that screens: right after the passes, it ends a job whose result surely misses a gate, before exports and the whole evaluation."""

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.evaluate.screening import surely_missed
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.stages.job import PressJob
from nightpress.core.compress.stages.state import State
from nightpress.core.handoff.report import Screening
from nightpress.core.recipes.anatomy import OWN_SHAPES
from nightpress.core.recipes.exports import TORCH_FORMATS


def run(job: PressJob, state: State) -> None:
    """Measure the pressed model on few texts, if the recipe wants that. Sets the state's screening if a gate is surely missed."""
    if not state.trial.screen or not _is_loadable(job, state):
        return
    job.clock.enter("evaluating")
    observed = run_consumer(
        state.runner or safetensors.CONSUMER,
        state.folder,
        state.trial.only(state.trial.screen),
        name="screening",
        scratch=job.scratch,
        device=job.device_of(None),
        parts=job.parts_of(None, state.folder),
        renumber=state.renumber_file(job.scratch),
        reference=state.baseline.observed.outputs_file,
        progress=job.clock.span(0.5, 0.52),
    )
    figures = quality.figures_of(state.trial.screen, state.trial.seed, state.baseline.observed, observed)
    missed = surely_missed(job.recipe.parsed_gates(), figures, "screening")
    if missed:
        worst = "; ".join(f"{result.gate}: {result.explanation}" for result in missed)
        state.screening = Screening(reason=f"Ended before its exports: {worst}.", gates=missed)
        job.log(state.screening.reason)


def _is_loadable(job: PressJob, state: State) -> bool:
    """Whether passes have changed the folder, and transformers loads what they left."""
    passes = [options for options in job.recipe.passes if options.stage == "folder"]
    return bool(passes) and OWN_SHAPES not in state.header.config and all(p.exports & TORCH_FORMATS for p in passes)
