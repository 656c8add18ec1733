"""Makes a search space from a model's header, a target, a goal and the fleet: which passes, in which order, with which values.

Each combination is only a proposal: `make_plan` decides whether it can work. Options that never work for the model are left out here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.anatomy import Anatomy, anatomy_of
from nightpress.core.recipes.exports import TORCH_FORMATS, runs_in_llama_cpp
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes.base import KEPT_MODULES
from nightpress.core.recipes.placement import Seat
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.search.space import Space, Value
from nightpress.core.recipes.targets import AIMS, target_for

Goal = Literal["size", "latency", "decode", "memory"]

#: An option whose plan takes longer than this on the fleet is left out.
_LONGEST_S = 3600.0
_SHARES = (0.125, 0.25, 0.375, 0.5)
_GROUPS = (32, 64, 128)
_GGUF = ("q4_0", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0")
#: The figures that each goal needs; quality is measured for the gates.
MEASURES: Mapping[Goal, tuple[Mapping[str, Any], ...]] = {
    "size": (),
    "memory": (),
    "latency": ({"metric": "latency", "batch": [1], "length": [128], "repeats": 20},),
    "decode": ({"metric": "generation-speed", "batch": [1], "prompt": [64], "tokens": 32},),
}


def auto_space(header: ModelHeader, target: str | None, goal: Goal, fleet: Sequence[Seat]) -> Space:
    """Return the space for this model. Raises NightpressError(invalid_recipe) if no pass that is tried by itself fits the model.

    target: a target other than `auto`, or None: the formats of the model's own target, and for the goals `size` and `memory` also those
    that transformers loads.
    """
    if goal == "decode" and not header.is_decoder:
        raise invalid(
            f"`minimize: decode` is for models that write text, and this is a {header.architecture}.", "Use `latency`."
        )
    formats: frozenset[str] = AIMS[target or target_for(header)].reads
    if target is None and goal in {"size", "memory"}:
        formats |= TORCH_FORMATS
    tried = _Tried(header, fleet)
    found = [recipe for recipe in _recipes(tried, formats) if tried.works(recipe)]
    if not found:
        raise invalid(
            f"space: nothing that is tried by itself fits a {header.architecture} for {' and '.join(sorted(formats))}.",
            "Name another `target`, or give a `space` of recipes with choices.",
        )
    return Space(found)


def auto_starts(space: Space) -> list[dict[str, Value]]:
    """Return the points that a study of an automatic space tries first: each recipe as the targets have it, and what was measured to do well."""
    starts = space.starts()
    for at, recipe in enumerate(space.recipes):
        for wished in _WISHED.get(str(recipe["name"]), ()):
            starts.append(_moved(space, at, wished))
    return [point for at, point in enumerate(starts) if point not in starts[:at]]


#: Name of a recipe → options of further points that a study tries first: those of built-in recipes.
_WISHED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "rounded": ({"bits": 5, "group_size": 64, "symmetric": False, "embeddings": True}, {"bits": 8, "group_size": None}),
    "rounded-for-llama-cpp": ({"bits": 4},),
}


def _moved(space: Space, recipe: int, wished: Mapping[str, Any]) -> dict[str, Value]:
    """Return the start of a recipe with other options, by the last part of their paths."""

    def ask(path: str, domain: Any) -> Value:
        name = path.rsplit(".", 1)[-1]
        if path == "recipe":
            value: Value = recipe
        elif name in wished and wished[name] in domain.options:
            value = domain.options.index(wished[name])
        else:
            value = domain.start
        chosen[path] = value
        return value

    chosen: dict[str, Value] = {}
    space.build(ask)
    return chosen


def _recipes(tried: "_Tried", formats: frozenset[str]) -> Iterable[dict[str, Any]]:
    graphs = [name for name in ("openvino", "onnx", "transformers.js") if name in formats]
    if graphs:
        yield from _in_graphs(tried, graphs)
    if "gguf" in formats:
        first = tried.shrinking("gguf")
        llama_cpp = {"format": "gguf", "type": _choice(_GGUF, "q8_0")}
        yield _recipe("llama-cpp-types", first, llama_cpp)
        if runs_in_llama_cpp(tried.header):
            rounded = {"pass": "gptq", "bits": _choice([4, 8], 4), "group_size": 32, "ignore": _ignored(tried.header)}
            yield _recipe("rounded-for-llama-cpp", [*first, rounded], llama_cpp, 32, 512)
    if "compressed-tensors" in formats:
        yield from _in_compressed_tensors(tried)


def _in_graphs(tried: "_Tried", graphs: Sequence[str]) -> Iterable[dict[str, Any]]:
    first, groups = tried.shrinking(graphs[0]), tried.groups()
    runtimes = [name for name in graphs if name != "transformers.js"]
    if runtimes:
        static = {
            "pass": "static-int8",
            "min_cosine": _choice([0.98, 0.99, 0.995, 0.997, 0.999], 0.997),
            "ranges": _choice(["min-max", "percentile", "mse"]),
        }
        yield _recipe("static-int8", [*first, static], _choice(runtimes), 64, 128)
    yield _recipe("dynamic-int8", [*first, {"pass": "dynamic-int8"}], _choice(graphs))
    yield _recipe("half-precision", first, {"format": _choice(graphs), "type": "fp16"})
    if runtimes:
        rounded = {"pass": _choice(["gptq", "weight-only"]), "bits": _choice([4, 8], 8), "group_size": _choice(groups)}
        yield _recipe("rounded-in-graphs", [*first, rounded], _choice(runtimes), 32, tried.length)


def _in_compressed_tensors(tried: "_Tried") -> Iterable[dict[str, Any]]:
    first, groups = tried.shrinking("compressed-tensors"), tried.groups()
    rounded = {
        "pass": _choice(["gptq", "awq"]) if tried.header.is_decoder else "gptq",
        "bits": _choice([3, 4, 5, 6, 8], 4),
        "group_size": _choice([*groups, None] if groups != [None] else groups, groups[-1]),
        "symmetric": _choice([True, False]),
        "embeddings": _choice([False, True]),
        "ignore": _ignored(tried.header),
    }
    yield _recipe("rounded", [*first, rounded], "compressed-tensors", 32, tried.length)
    by_layer = {
        "pass": "gptq",
        "budget": {"range": [3.25, 8.0], "step": 0.25, "start": 4.5},
        "candidates": [2, 3, 4, 6, 8],
        "group_size": _choice(groups),
    }
    yield _recipe("bits-by-layer", [*first, by_layer], "compressed-tensors", 32, tried.length)


def _recipe(name: str, passes: list[Any], export: Any, samples: int = 0, length: int = 0) -> dict[str, Any]:
    calibration = {"calibration": {"samples": samples, "length": length}} if samples else {}
    return {"name": name, "passes": passes, "exports": [export], **calibration}


def _choice(options: Sequence[Any], start: Any = None) -> Any:
    """Return a choice of these options, or the only option."""
    if len(options) == 1:
        return options[0]
    return {"choice": list(options), **({} if start is None else {"start": start})}


def _anatomy(header: ModelHeader) -> Anatomy | None:
    try:
        return anatomy_of(header, "layers")
    except NightpressError:
        return None


def _ignored(header: ModelHeader) -> Any:
    """Return which layers may stay in float: none in the blocks, the last block, or the first and the last."""
    anatomy = _anatomy(header)
    usual = list(KEPT_MODULES)
    if anatomy is None or anatomy.layers < 3:
        return usual
    blocks = anatomy.prefix.replace(".", r"\.")
    last = anatomy.layers - 1
    return _choice([usual, [*usual, rf"re:{blocks}{last}\..*"], [*usual, rf"re:{blocks}(0|{last})\..*"]])


def _shrinking(header: ModelHeader) -> list[Any]:
    """Return passes that make the shapes smaller, each alone and then trained for a short time."""
    anatomy = _anatomy(header)
    if anatomy is None:
        return []
    counts = list(range(1, max(1, anatomy.layers // 3) + 1))
    shares = _choice(_SHARES)
    alone: list[dict[str, Any]] = [{"pass": "layers", "count": _choice(counts)}] if anatomy.layers > 2 else []
    alone += [{"pass": "channels", "share": shares}, {"pass": "heads", "share": shares}]
    recover = {"pass": "recover", "train": {"steps": _choice([50, 200]), "length": 64, "batch": 16}}
    return [*alone, *([step, recover] for step in alone)]


class _Tried:
    """Decides which parts of a space can work for a model, by a plan of their start."""

    def __init__(self, header: ModelHeader, fleet: Sequence[Seat]) -> None:
        self.header = header
        self.length = 512 if header.is_decoder else 128  #: tokens of a calibration sample
        self._fleet = fleet

    def works(self, recipe: Mapping[str, Any]) -> bool:
        """Return whether the start of a recipe of the space works, with a plan that takes at most `_LONGEST_S` seconds."""
        space = Space([recipe])
        try:
            plan = make_plan(parse_recipe(space.at(space.starts()[0])), self.header, self._fleet)
        except NightpressError:
            return False
        return plan.estimate is not None and plan.estimate.seconds <= _LONGEST_S

    def shrinking(self, name: str) -> list[Any]:
        """Return a choice of the passes that may come first for this format; an empty list if there are none."""
        then = [{"pass": "weight-only", "bits": 8}] if name == "compressed-tensors" else []
        options = [
            option
            for option in _shrinking(self.header)
            if self.works(_recipe("tried", [*(option if isinstance(option, list) else [option]), *then], name, 32, 128))
        ]
        return [_choice([None, *options])] if options else []

    def groups(self) -> list[int | None]:
        """Return the group sizes that divide every layer; [None] if there are none."""
        return [
            size
            for size in _GROUPS
            if self.works(
                _recipe("tried", [{"pass": "weight-only", "bits": 4, "group_size": size}], "compressed-tensors")
            )
        ] or [None]
