"""Searches for the smallest result of a pass that keeps a gate.

The results form a line of steps, from the smallest result to the safest. Bisection finds the first step that keeps the gate, so that the
number of candidates that are made and measured grows with the logarithm of the number of steps. Each is measured once: a later attempt of the
job finds the figures of an earlier one.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nightpress.core.compress.context import Judged, PassContext
from nightpress.core.compress.model.checkpoint import write_file
from nightpress.core.handoff.report import PassRecord, Tried, Within
from nightpress.core.recipes.gates import parse_gate, read_gate
from nightpress.core.recipes.passes import PassOptions

_SHARE = 0.95  #: of the pass's progress, for the candidates


def bisect(
    last: int, keeps: Callable[[int], bool], *, first: int | None = None, sure: bool = False
) -> tuple[int, bool]:
    """Return the first of the steps 0 to `last` that keeps the gate, and whether it does. If none does, the step is `last`.

    Steps behind one that keeps the gate are taken to keep it, too. first: the step that is tried first; None: the middle. sure: `last` keeps
    the gate for certain, and is not tried.
    """
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2 if first is None else first
        first = None
        if keeps(middle):
            high, sure = middle, True
        else:
            low = middle + 1
    return high, sure or keeps(high)


@dataclass(frozen=True)
class Candidate:
    """A result that was made and measured."""

    size_bytes: int
    judged: Judged


class _Known(BaseModel):
    """The file of a search: the candidates that were measured so far."""

    model_config = ConfigDict(frozen=True)

    made_of: str
    tried: dict[int, Tried]


class Search:
    """The search of a pass. It keeps the figures of its candidates in a file, for later attempts."""

    def __init__(self, options: PassOptions, steps: Sequence[str], context: PassContext, file: Path) -> None:
        """options, steps: what decides the candidates, beside the context, which has a judge. steps: what each result is, for a reader."""
        assert context.judge is not None
        judge = context.judge
        self.name, self.steps, self.context, self.judge, self.file = options.name, steps, context, judge, file
        body = (options.model_dump_json(), context.calibration.model_dump_json(), judge.gate, *steps)
        self._made_of = hashlib.sha256("\n".join(body).encode()).hexdigest()
        self._tried = self._known()

    def _known(self) -> dict[int, Tried]:
        """The candidates that an earlier attempt measured."""
        try:
            known = _Known.model_validate_json(self.file.read_bytes())
        except (OSError, ValueError):
            return {}
        return known.tried if known.made_of == self._made_of else {}

    def run(
        self, make: Callable[[int], Candidate], *, first: int | None = None, sure: bool = False
    ) -> tuple[int, bool]:
        """Return the chosen step, and whether it keeps the gate. If none does, it is the one that comes nearest, and of equals the smallest.

        make: makes and measures a step's result. It is called once for a step, and not for one that an earlier attempt measured. first,
        sure: as in `bisect`.
        """

        def keeps(step: int) -> bool:
            if step not in self._tried:
                started = time.monotonic()
                self._tried[step] = _tried(self.steps[step], make(step), started)
                known = _Known(made_of=self._made_of, tried=self._tried)
                write_file(self.file, known.model_dump_json().encode())
                self.context.whole(len(self._tried), self.file)
            return self._tried[step].passed

        step, kept = bisect(len(self.steps) - 1, keeps, first=first, sure=sure)
        if kept:
            return step, True
        sign = 1 if parse_gate(*read_gate(self.judge.gate)).is_upper else -1
        return min(self._tried, key=lambda at: (sign * self._tried[at].observed, at)), False

    def span(self) -> tuple[float, float]:
        """The part of the pass's progress for the next candidate, if as many are tried as may be."""
        done, most = len(self._tried), len(self.steps).bit_length() + 1
        return _SHARE * min(1.0, done / most), _SHARE * min(1.0, (done + 1) / most)

    def warnings(self, *, kept: bool) -> tuple[str, ...]:
        unsure = sum(tried.unsure for tried in self._tried.values())
        found = []
        if not kept:
            found.append(
                f"`{self.name}`: none of the {len(self._tried)} results that were tried keeps {self.judge.gate}."
            )
        if unsure:
            found.append(
                f"`{self.name}`: {unsure} of the {len(self._tried)} results that were tried keep {self.judge.gate} by their figure, and miss it by the end of its 95% interval: {self.judge.examples} examples are few for this gate. With more, a smaller result may be found."
            )
        return tuple(found)

    def outcome(self, step: int, *, kept: bool) -> Within:
        smaller = [at for at, tried in self._tried.items() if at < step and not tried.passed]
        return Within(
            gate=self.judge.gate,
            data=self.judge.data,
            examples=self.judge.examples,
            candidates=len(self.steps),
            tried=tuple(self._tried.values()),
            chosen=self.steps[step],
            kept=kept,
            beyond=self._tried[max(smaller)] if kept and smaller else None,
            note=self.judge.note,
        )


def _tried(what: str, made: Candidate, started: float) -> Tried:
    end, value = made.judged.by_end, made.judged.by_value
    assert end.observed is not None
    assert value.observed is not None
    return Tried(
        what=what,
        size_bytes=made.size_bytes,
        value=value.observed,
        observed=end.observed,
        passed=end.passed,
        unsure=value.passed and not end.passed,
        explanation=end.explanation,
        seconds=round(time.monotonic() - started, 3),
    )


def smallest_model(
    search: Search,
    target: Path,
    press: Callable[[int, Path, PassContext], PassRecord],
    *,
    first: int | None = None,
    sure: bool = False,
) -> PassRecord:
    """Find the smallest model that keeps the gate, and leave it in `target`. press(step, folder, context) writes a step's model.

    first, sure: as in `bisect`. The smallest candidate so far that keeps the gate stays on the disk, so that it need not be pressed again.
    """
    started, context = time.monotonic(), search.context
    folder = search.file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)

    def make(step: int) -> Candidate:
        start, end = search.span()
        middle, what = start + 0.8 * (end - start), search.steps[step]
        candidate = folder / str(step)
        shutil.rmtree(candidate, ignore_errors=True)
        trying = replace(context.part(start, middle, f"trying {what}: "), checkpoint=lambda _path, _step: None)
        record = press(step, candidate, trying)
        write_file(folder / f"{step}.json", record.model_dump_json().encode())
        context.progress(middle, f"measuring {what}")
        size = sum(path.stat().st_size for path in candidate.glob("*.safetensors"))
        judged = search.judge.model(candidate)
        for other in folder.glob("*/"):  # each that keeps the gate is smaller than the one before it
            if (other == candidate) != judged.by_end.passed:
                shutil.rmtree(other)
        return Candidate(size, judged)

    step, kept = search.run(make, first=first, sure=sure)
    candidate, record = folder / str(step), folder / f"{step}.json"
    if candidate.is_dir() and record.is_file():
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        candidate.rename(target)
        made = PassRecord.model_validate_json(record.read_bytes())
    else:
        context.progress(_SHARE, f"pressing {search.steps[step]}")
        made = press(step, target, context)
    shutil.rmtree(folder)
    return made.model_copy(
        update={
            "seconds": time.monotonic() - started,
            "within": search.outcome(step, kept=kept),
            "warnings": (*made.warnings, *search.warnings(kept=kept)),
        }
    )
