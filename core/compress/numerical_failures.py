"""Errors for layers that compute NaN or infinity on the calibration data."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nightpress.core.errors import ErrorCode, NightpressError

_NAMED = 3  #: layers that a message names at most


class CanOverflow(Protocol):
    def is_finite(self) -> bool: ...


def check_finite(layers: Sequence[str], seen: CanOverflow | Tensor) -> None:
    """Raises NightpressError(numerical_failure) that names the layers if `seen`, their tensor or statistic from calibration, is not finite.

    No method could continue: every comparison with NaN is false, so searches and masks would leave weights unchanged without an error.
    """
    if bool(torch.isfinite(seen).all()) if isinstance(seen, Tensor) else seen.is_finite():
        return
    raise NightpressError(
        ErrorCode.NUMERICAL_FAILURE,
        f"The calibration data brought NaN or infinity into {_listed(layers)}.",
        hint="Check that the source model answers sensibly: its weights may be damaged. If it needs more range than 16-bit floats have, "
        "set `calibration: {dtype: float32}`.",
        layers=list(layers[:100]),
    )


@contextlib.contextmanager
def naming(layers: Sequence[str]) -> Iterator[None]:
    """Add the names of these layers to a numerical failure that a solver raises in this context."""
    try:
        yield
    except NightpressError as error:
        if error.code is not ErrorCode.NUMERICAL_FAILURE or "layers" in error.details:
            raise
        raise NightpressError(
            error.code,
            f"{_listed(layers)}: {error.message}",
            hint=error.hint,
            **error.details,
            layers=list(layers[:100]),
        ) from error


def _listed(layers: Sequence[str]) -> str:
    more = len(layers) - _NAMED
    return ", ".join(layers[:_NAMED]) + (f" and {more} more" if more > 0 else "")
