"""The passes that this process knows: the built-in passes, and those of installed packages that an operator allows. No torch here.

A package offers passes through the entry point group `nightpress.passes`: an entry point maps a pass's name to the class of its options. A
package that is not allowed is never imported. A fault of an allowed package disables its pass and is kept as a sentence; all other passes
work.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.passes.base import PassOptions

GROUP = "nightpress.passes"


class Provider(BaseModel):
    """The package that a pass comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


class _Offer(NamedTuple):
    """A pass that an installed package offers. The package may not be imported yet."""

    name: str
    provider: Provider
    entry_point: EntryPoint


class _Allowed(NamedTuple):
    """The passes of the allowed packages, and the faults found in them."""

    types: Mapping[str, type[PassOptions]]
    providers: Mapping[str, Provider]
    faults: Mapping[str, str]  #: pass, or allowed name that was not found → the fault, as a sentence


_allowed = _Allowed({}, {}, {})


def allow(names: Iterable[str]) -> Iterable[str]:
    """Import the named passes of installed packages. They replace the passes that were allowed before.

    names: packages or passes. Called once, when a process starts. Returns the faults, a sentence each; a pass with a fault is left out.
    """
    wanted = {_normalized(name): name for name in names}
    offers = list(_offers()) if wanted else []
    chosen = [
        offer for offer in offers if wanted.keys() & {_normalized(offer.name), _normalized(offer.provider.package)}
    ]
    there = {_normalized(word) for offer in chosen for word in (offer.name, offer.provider.package)}
    missing = {
        name: f"NIGHTPRESS_PASSES allows {name}, and no package that is installed here is called so or has a pass of that name."
        for key, name in wanted.items()
        if key not in there
    }
    _load(chosen, missing)
    return tuple(_allowed.faults.values())


def allow_exactly(providers: Mapping[str, Provider]) -> None:
    """Import exactly these passes, from these versions of these packages.

    providers: pass → package. Raises NightpressError(internal) if a pass is not available in that version, or has a fault: a job must run
    with the packages that it records.
    """
    offers = {(offer.name, offer.provider.package): offer for offer in (_offers() if providers else ())}
    chosen = []
    for name, wanted in providers.items():
        offer = offers.get((name, wanted.package))
        if offer is None or offer.provider != wanted:
            found = "it isn't installed" if offer is None else f"version {offer.provider.version} is installed"
            raise NightpressError(
                ErrorCode.INTERNAL,
                f"The job's pass `{name}` is to come from {wanted}, and where the job runs {found}.",
                hint="Restart the worker after each change of its packages.",
            )
        chosen.append(offer)
    _load(chosen, {})
    for fault in _allowed.faults.values():
        raise NightpressError(ErrorCode.INTERNAL, fault, hint="Mend or update the package on this worker.")


def pass_types() -> tuple[type[PassOptions], ...]:
    """Return the options class of every pass, sorted by name: the built-in passes first, then those of packages."""
    return (*_built_in().values(), *(_allowed.types[name] for name in sorted(_allowed.types)))


def pass_type(name: str) -> type[PassOptions] | None:
    """Return the options class of a pass; None if this process does not know the pass."""
    return _built_in().get(name) or _allowed.types.get(name)


def provider_of(name: str) -> Provider | None:
    """Return the package that a pass comes from; None for a built-in pass, and for a pass that this process does not know."""
    return _allowed.providers.get(name)


def providers_of(names: Iterable[str]) -> dict[str, Provider]:
    """Return pass → package, for the named passes that are not built in."""
    return {name: found for name in sorted(set(names)) if (found := provider_of(name)) is not None}


def packages_of(recipe: Mapping[str, Any]) -> tuple[Provider, ...]:
    """Return the packages of a recipe's passes. recipe: as a mapping, not a `Recipe`."""
    return tuple(providers_of(options["pass"] for options in recipe.get("passes", ())).values())


def faults() -> Mapping[str, str]:
    """Return pass, or allowed name that was not found → the fault, as a sentence."""
    return _allowed.faults


def why_unknown(name: str) -> tuple[str, str] | None:
    """Return (why this process does not know the pass, what to do) if an installed package has the pass; None if none has it."""
    if name in _allowed.faults:
        return _allowed.faults[
            name
        ], "Whoever runs the service sees to the package, or takes it out of NIGHTPRESS_PASSES."
    for offer in _offers():
        if offer.name == name:
            package = offer.provider.package
            return (
                f"there is no pass {name!r} here: the package {offer.provider} has one and is installed, but it is not allowed",
                f"Whoever runs the service allows it with NIGHTPRESS_PASSES='[\"{package}\"]', for API, control process and workers alike.",
            )
    return None


def adapter() -> TypeAdapter[PassOptions]:
    """Return the pydantic adapter that reads any known pass: a union with the field `pass` as the discriminator."""
    return _adapter(pass_types())


def _load(offers: Iterable[_Offer], missing: Mapping[str, str]) -> None:
    global _allowed
    types: dict[str, type[PassOptions]] = {}
    providers: dict[str, Provider] = {}
    wrong = dict(missing)
    for offer in offers:
        if offer.name in providers:
            both = " and ".join(sorted([str(providers.pop(offer.name)), str(offer.provider)]))
            types.pop(offer.name)
            wrong[offer.name] = (
                f"The packages {both} both have a pass `{offer.name}`, so neither is used: allow one package."
            )
        elif offer.name not in wrong:
            try:
                types[offer.name] = _options_of(offer)
                providers[offer.name] = offer.provider
            except (Exception, SystemExit) as error:  # another package can raise anything at import
                wrong[offer.name] = (
                    f"The pass `{offer.name}` of the package {offer.provider} can't be used: {type(error).__name__}: {error}."
                )
    _allowed = _Allowed(types, providers, wrong)


def _options_of(offer: _Offer) -> type[PassOptions]:
    """Import the options class of an offer. Raises TypeError if the class is not complete or not valid, or any error of the package."""
    if offer.name in _built_in():
        raise TypeError("a built-in pass has that name; give it another")
    options = offer.entry_point.load()
    if not (isinstance(options, type) and issubclass(options, PassOptions)):
        raise TypeError(f"{offer.entry_point.value} is no subclass of PassOptions")
    if "pass_" not in options.model_fields or options.model_fields["pass_"].default != offer.name:
        raise TypeError(
            f'its field `pass_` must be Literal["{offer.name}"] with that default, as its entry point is called'
        )
    needed: dict[str, Callable[[], bool]] = {
        "exports": lambda: bool(getattr(options, "exports", None)),
        "implementation": lambda: bool(options.implementation),
        "describe": lambda: options.describe is not PassOptions.describe,
        "cost": lambda: options.cost is not PassOptions.cost,
    }
    if lacking := [name for name, is_there in needed.items() if not is_there()]:
        raise TypeError(f"{options.__name__} doesn't say {', '.join(lacking)}")
    options.model_rebuild(force=True)  # raises if a field's type can't be resolved
    _adapter((*_built_in().values(), options))  # raises if `pass_` does not distinguish it from other passes
    return options


def _offers() -> Iterator[_Offer]:
    """Yield the passes that the metadata of installed packages name. Nothing is imported."""
    for found in entry_points(group=GROUP):
        if found.dist is not None:
            yield _Offer(found.name, Provider(package=found.dist.name, version=found.dist.version), found)


def _normalized(name: str) -> str:
    """Return a name in the form in which package indexes compare names."""
    return name.strip().lower().replace("_", "-").replace(".", "-")


@cache
def _built_in() -> dict[str, type[PassOptions]]:
    """Return name of a pass → its options class, for every class in this folder that has a `pass_` field."""
    found: dict[str, type[PassOptions]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, PassOptions) and value.__module__ == module.name:
                field = value.model_fields.get("pass_")
                if field is not None and isinstance(field.default, str):
                    found[field.default] = value
    return dict(sorted(found.items()))


@cache
def _adapter(types: tuple[type[PassOptions], ...]) -> TypeAdapter[PassOptions]:
    union: Any = reduce(or_, types)
    return TypeAdapter(Annotated[union, Field(discriminator="pass_")])
