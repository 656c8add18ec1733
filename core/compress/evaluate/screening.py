"""Decides from a few texts whether a pressed model surely misses a gate. The favourable end of each figure's interval is compared."""

from collections.abc import Iterable, Sequence

from nightpress.core.handoff.report import GateResult, Measurement
from nightpress.core.recipes.gates import Gate

SAMPLES = 16  #: texts of a screening
#: Intervals of few texts are widened by this factor: the bootstrap's intervals of so few are too narrow.
_WIDER = 1.5


def surely_missed(gates: Sequence[Gate], figures: Sequence[Measurement], name: str) -> tuple[GateResult, ...]:
    """Return the gates that the model named `name` misses even at the favourable ends of the figures' widened intervals."""
    return tuple(result for gate in gates for result in _missed(gate, figures, name))


def _missed(gate: Gate, figures: Sequence[Measurement], name: str) -> Iterable[GateResult]:
    upper = gate.is_upper
    for figure in figures if not gate.slice else ():  # few texts say little about a slice of them
        if figure.name != gate.metric:
            continue
        value, low, high = (
            (figure.value, figure.low, figure.high)
            if gate.relative == "absolute"
            else (figure.change, figure.change_low, figure.change_high)
        )
        end = low if upper else high
        if value is None or end is None:
            continue
        observed = value + _WIDER * (end - value) + (1.0 if gate.relative in {"share", "times"} else 0.0)
        if observed > gate.value if upper else observed < gate.value:
            said = f"at best {observed:.5g} on {figure.n} examples of {figure.data}"
            yield GateResult(gate=str(gate), artifact=name, observed=observed, passed=False, explanation=said)
