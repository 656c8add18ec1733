"""The cost of running the source and the pressed model, counted from their headers."""

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.passes.registry import Findings, ModelPair, measure_pass
from nightpress.core.compress.roofline import device_of
from nightpress.core.recipes.passes import Profiling
from nightpress.core.recipes.profile import profile_of


@measure_pass(Profiling)
def profile(models: ModelPair, options: Profiling, context: PassContext) -> Findings:
    """Return a profile of each model. Raises NightpressError(invalid_recipe) for a family whose layout is not known."""
    device = device_of(options.device, device=context.device, threads=context.threads)
    headers = {"source": models.source_header, "pressed": models.pressed_header}
    return Findings(tuple(profile_of(header, name, options.shapes, device) for name, header in headers.items()))
