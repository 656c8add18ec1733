"""Says that a call of a library goes on, where the library itself says nothing."""

import contextlib
from collections.abc import Iterator

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.runners.measure import every_few_seconds


@contextlib.contextmanager
def telling(context: PassContext, fraction: float, what: str) -> Iterator[None]:
    """Send the progress now, and every few seconds for how long the block runs."""
    context.progress(fraction, what)
    with every_few_seconds(lambda spent: context.progress(fraction, f"{what}, for {spent:.0f} s")):
        yield
