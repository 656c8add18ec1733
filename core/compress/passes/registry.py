"""Maps each pass to the function that runs it. A decorator registers the function under the class of its options.

@folder_pass(Clip)
def clip(source: Path, target: Path, options: Clip, context: PassContext) -> PassRecord: ...
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import PassOptions, catalog
from nightpress.core.recipes.passes.base import Stage
from nightpress.core.recipes.profile import Profile

Function = TypeVar("Function", bound=Callable[..., Any])

#: (source folder, target folder, options, context) → record of the pass. `target` must not exist; afterwards it is a complete model folder.
ModelPass = Callable[[Path, Path, Any, PassContext], PassRecord]
#: (model folder, graph traced from it, options, context) → the graph that replaces it, and the record of the pass.
GraphPass = Callable[[Path, Traced, Any, PassContext], tuple[Traced, PassRecord]]

RuntimePasses = Sequence[tuple[int, PassOptions]]  #: passes of the stage `runtime`, each with its index in the recipe
Records = tuple[PassRecord, ...]


@dataclass(frozen=True)
class ModelPair:
    """The two models that a pass of the stage `measure` compares."""

    source: Path
    source_header: ModelHeader
    pressed: Path  #: the folder that the last pass wrote; the weights of a quantized model are codes there
    pressed_header: ModelHeader  #: header of the float model, but each tensor's `size` is that of its stored codes


@dataclass(frozen=True)
class Findings:
    """The result of a pass of the stage `measure`."""

    profiles: tuple[Profile, ...] = ()
    record: PassRecord | None = None


MeasurePass = Callable[[ModelPair, Any, PassContext], Findings]

#: Name of a pass in a recipe → its function.
MODEL_PASSES: dict[str, ModelPass] = {}
GRAPH_PASSES: dict[str, GraphPass] = {}
MEASURE_PASSES: dict[str, MeasurePass] = {}
#: (name of a pass, runtime) → its function. Each runtime's exporter defines the arguments.
RUNTIME_PASSES: dict[tuple[str, str], Callable[..., PassRecord]] = {}


def folder_pass(*options: type[PassOptions]) -> Callable[[Function], Function]:
    """Register a `ModelPass` for these options."""
    return _registered(MODEL_PASSES, "folder", {_name(option): option for option in options})


def graph_pass(*options: type[PassOptions]) -> Callable[[Function], Function]:
    """Register a `GraphPass` for these options."""
    return _registered(GRAPH_PASSES, "graph", {_name(option): option for option in options})


def measure_pass(*options: type[PassOptions]) -> Callable[[Function], Function]:
    """Register a `MeasurePass` for these options."""
    return _registered(MEASURE_PASSES, "measure", {_name(option): option for option in options})


def together(some: Sequence[PassRecord], more: Sequence[PassRecord]) -> list[PassRecord]:
    """The records of the same passes on one graph and on another of the same model, as records of both. `some` may be empty."""
    if not some:
        return list(more)
    return [
        a.model_copy(
            update={
                "seconds": a.seconds + b.seconds,
                "layers": (*a.layers, *b.layers),
                "summary": a.summary | {"matrices": len(a.layers) + len(b.layers)},
            }
        )
        for a, b in zip(some, more, strict=True)
    ]


def runtime_pass(runtime: str, *options: type[PassOptions]) -> Callable[[Function], Function]:
    """Register a function that applies these options to the graph of a runtime: `onnx` or `openvino`."""
    return _registered(RUNTIME_PASSES, "runtime", {(_name(option), runtime): option for option in options})


def model_pass(options: PassOptions) -> ModelPass:
    """Return the function of a pass of the stage `folder`.

    Imports `options.implementation` first if the pass comes from another package. Raises NightpressError(internal) if that import fails,
    or if no function is registered for the pass.
    """
    return _found(MODEL_PASSES, options.name, options)


def graph_pass_of(options: PassOptions) -> GraphPass:
    """As `model_pass`, for the stage `graph`."""
    return _found(GRAPH_PASSES, options.name, options)


def measure_pass_of(options: PassOptions) -> MeasurePass:
    """As `model_pass`, for the stage `measure`."""
    return _found(MEASURE_PASSES, options.name, options)


def runtime_pass_of(options: PassOptions, runtime: str) -> Callable[..., PassRecord]:
    """As `model_pass`, for the stage `runtime`."""
    return _found(RUNTIME_PASSES, (options.name, runtime), options)


Key = TypeVar("Key")
Registered = TypeVar("Registered")


def _registered(
    table: dict[Key, Any], stage: Stage, options: Mapping[Key, type[PassOptions]]
) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for key, option in options.items():
            if option.stage != stage:
                raise TypeError(
                    f"{option.__name__} is of the stage {option.stage}, and {function.__name__} is for the stage {stage}"
                )
            if key in table:
                raise TypeError(
                    f"{table[key].__module__}.{table[key].__name__} does what {option.__name__} says already"
                )
            table[key] = function
        return function

    return register


def _found(table: Mapping[Key, Registered], key: Key, options: PassOptions) -> Registered:
    provider = catalog.provider_of(options.name)
    if key not in table and provider is not None:
        try:
            importlib.import_module(options.implementation)
        except (Exception, SystemExit) as error:  # a module of another package can raise anything at import
            raise NightpressError(
                ErrorCode.INTERNAL,
                f"The pass `{options.name}` of the package {provider} can't be used: {options.implementation}: {type(error).__name__}: {error}.",
                hint="Mend or update the package on this worker.",
            ) from error
    if key not in table:
        raise NightpressError(
            ErrorCode.INTERNAL,
            f"The pass `{options.name}`{f' of the package {provider}' if provider else ''} has no function: {options.implementation or 'no module'} registers none for its stage, {options.stage}.",
            hint="Register it with the decorator of its stage; see docs/how-to/write-a-pass.md.",
        )
    return table[key]


def _name(options: type[PassOptions]) -> str:
    return str(options.model_fields["pass_"].default)
