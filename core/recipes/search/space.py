"""Search spaces: recipes in which some values are choices or ranges. A point of a space is a recipe.

In a recipe of a space, `{choice: [a, b]}` and `{range: [low, high]}` may stand for any value, also for a whole pass. A `null` that is
chosen in a list leaves the entry out, and a list that is chosen there stands for its entries. All other values are fixed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nightpress.core.recipes.linears import invalid

MAX_RECIPES = 32
_MAX_OPTIONS = 100
_LARGEST = 1e12  #: of the numbers of a range
RECIPE = "recipe"  #: the parameter that chooses one of the space's recipes

#: A parameter's value: the index of a chosen option, or a number of a range.
Value = int | float
Params = Mapping[str, Value]


@dataclass(frozen=True)
class Choice:
    """Some options. A parameter's value is the index of an option."""

    options: tuple[Any, ...]
    start: int = 0  #: index of the option that a study tries first

    @property
    def ordered(self) -> bool:
        """Whether the options are rising numbers, so that neighbours are alike."""
        numbers = all(isinstance(option, int | float) and not isinstance(option, bool) for option in self.options)
        return numbers and list(self.options) == sorted(set(self.options))

    def said(self, value: Value) -> Any:
        return self.options[int(value)]


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included; whole numbers if `step` is whole."""

    low: float
    high: float
    step: float | None = None
    log: bool = False
    start: Value = 0  #: the number that a study tries first

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int | None)

    def said(self, value: Value) -> Value:
        return int(value) if self.whole else float(f"{value:.6g}")


Domain = Choice | Range
Ask = Callable[[str, Domain], Value]  #: (a parameter's path, its domain) → the parameter's value


class Space:
    """Recipes with choices and ranges. Raises NightpressError(invalid_recipe) for one that can't be read."""

    def __init__(self, recipes: Sequence[Mapping[str, Any]]) -> None:
        if not 1 <= len(recipes) <= MAX_RECIPES:
            raise invalid(f"space: it has {len(recipes)} recipes.", f"Give 1 to {MAX_RECIPES}.")
        self.recipes = tuple(dict(recipe) for recipe in recipes)
        self._which = Choice(tuple(range(len(self.recipes))))
        for at, recipe in enumerate(self.recipes):
            _check(recipe, f"space.{at}")

    def build(self, ask: Ask) -> dict[str, Any]:
        """Return the recipe at a point. `ask` is called for each parameter that the point needs, in a fixed order."""
        at = int(ask(RECIPE, self._which)) if len(self.recipes) > 1 else 0
        return {key: _built(value, f"{at}.{key}", ask) for key, value in self.recipes[at].items()}

    def at(self, params: Params) -> dict[str, Any]:
        """Return the recipe at a point with known parameters. Raises KeyError if a parameter is missing."""
        return self.build(lambda path, _domain: params[path])

    def domains(self, params: Params) -> dict[str, Domain]:
        """Return the domains of a point's parameters."""
        found: dict[str, Domain] = {}

        def ask(path: str, domain: Domain) -> Value:
            found[path] = domain
            return params[path]

        self.build(ask)
        return found

    def says(self, params: Params) -> dict[str, Any]:
        """Return a point's parameters as people write them: path → option or number."""
        return {
            path: self.recipes[int(params[path])].get("name", int(params[path]))
            if path == RECIPE
            else domain.said(params[path])
            for path, domain in self.domains(params).items()
        }

    def holds(self, params: Params) -> bool:
        """Return whether this is a point of the space."""
        try:
            domains = self.domains(params)
            for path, domain in domains.items():
                domain.said(params[path])
        except (KeyError, IndexError, TypeError, ValueError):
            return False
        return domains.keys() == params.keys()

    def starts(self) -> list[dict[str, Value]]:
        """Return a point of each recipe: that of the options with `start`, else of the first options."""
        return [self._start(at) for at in range(len(self.recipes))]

    def _start(self, at: int) -> dict[str, Value]:
        chosen: dict[str, Value] = {}

        def ask(path: str, domain: Domain) -> Value:
            chosen[path] = at if path == RECIPE else domain.start
            return chosen[path]

        self.build(ask)
        return chosen


def digest_of(recipe: Mapping[str, Any]) -> str:
    """Return a SHA-256 of the parts of a normalised recipe that decide the pressed model and its forms."""
    parts = {key: recipe[key] for key in ("passes", "exports", "calibration", "device", "seed") if key in recipe}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _built(value: Any, path: str, ask: Ask) -> Any:
    domain = _domain(value)
    if isinstance(domain, Choice):
        at = ask(path, domain)
        return _built(domain.options[int(at)], f"{path}={int(at)}", ask)
    if isinstance(domain, Range):
        return domain.said(ask(path, domain))
    if isinstance(value, Mapping):
        return {key: _built(inner, f"{path}.{key}", ask) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        entries: list[Any] = []
        for at, inner in enumerate(value):
            built = _built(inner, f"{path}.{at}", ask)
            if _domain(inner) is None:
                entries.append(built)
            elif built is not None:
                entries += built if isinstance(built, list) else [built]
        return entries
    return value


def _domain(value: Any) -> Domain | None:
    """Return the choice or the range that this value stands for; None: it is a fixed value."""
    if not isinstance(value, Mapping):
        return None
    if "choice" in value and set(value) <= {"choice", "start"}:
        options = tuple(value["choice"])
        return Choice(options, options.index(value["start"]) if "start" in value else 0)
    if "range" in value and set(value) <= {"range", "step", "log", "start"}:
        low, high = value["range"]
        return Range(low, high, value.get("step"), value.get("log", False), value.get("start", low))
    return None


def _check(value: Any, path: str) -> None:
    """Raise NightpressError(invalid_recipe) for a choice or range below `path` that is none."""
    for place, found in _marked(value, path):
        if (why := _flaw(found)) is not None:
            raise invalid(
                f"{place}: {why}.", "Write {choice: [4, 8]}, or {range: [0.1, 0.5]}; `step` and `log` are optional."
            )


def _marked(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if "choice" in value or "range" in value:
            yield path, value
        for key, inner in value.items():
            yield from _marked(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for at, inner in enumerate(value):
            yield from _marked(inner, f"{path}.{at}")


def _flaw(marked: Mapping[str, Any]) -> str | None:
    """Return why this mapping is no choice and no range; None: it is one."""
    if "choice" in marked:
        options = marked["choice"]
        if set(marked) - {"choice", "start"}:
            return "a choice has `choice` and, if wanted, `start`, and nothing else"
        if not isinstance(options, list | tuple) or not 1 <= len(options) <= _MAX_OPTIONS:
            return f"a choice is a list of 1 to {_MAX_OPTIONS} options"
        if "start" in marked and marked["start"] not in options:
            return "`start` is none of the options"
        return None
    if set(marked) - {"range", "step", "log", "start"}:
        return "a range has `range` and, if wanted, `step`, `log` and `start`, and nothing else"
    ends = marked["range"]
    if not isinstance(ends, list | tuple) or len(ends) != 2 or not all(map(_is_number, ends)) or ends[0] >= ends[1]:
        return f"a range is two numbers up to {_LARGEST:g}, the smaller first"
    step, log, start = marked.get("step"), marked.get("log", False), marked.get("start", ends[0])
    if not _is_number(start) or not ends[0] <= start <= ends[1]:
        return "`start` is a number of the range"
    if step is not None and (not _is_number(step) or step <= 0):
        return "`step` is a number above 0"
    if not isinstance(log, bool) or (log and (ends[0] <= 0 or step is not None)):
        return "`log: true` needs ends above 0, and no `step`"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
