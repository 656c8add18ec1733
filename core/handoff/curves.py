"""Points of curves, e.g. of a training loss, as lines of a job's log: written by the supervisor, read for trackers."""

import math
import re
from typing import NamedTuple

from nightpress.core.handoff.frames import Metric

LEVEL = "debug"  #: of these lines
_LINE = re.compile(r"(?P<name>\S.*?) = (?P<value>\S+)(?: at step (?P<step>\d{1,18}))?", re.ASCII)


class Reading(NamedTuple):
    name: str
    value: float
    step: int | None


def line_of(metric: Metric) -> str:
    step = "" if metric.step is None else f" at step {metric.step}"
    return f"{metric.name} = {metric.value:g}{step}"


def read_line(text: str) -> Reading | None:
    """The point that a line holds. None: the line says something else, or its value is not finite."""
    found = _LINE.fullmatch(text)
    if found is None:
        return None
    try:
        value = float(found["value"])
    except ValueError:
        return None
    step = found["step"]
    return Reading(found["name"], value, None if step is None else int(step)) if math.isfinite(value) else None
