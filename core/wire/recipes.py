"""Recipes on the wire."""

import inspect
from typing import Annotated, Any, Self

from pydantic import Field

from nightpress.core.recipes.passes import PassOptions
from nightpress.core.recipes.passes.catalog import provider_of
from nightpress.core.recipes.plan import Plan
from nightpress.core.wire.base import Request, View


class RecipeView(View):
    name: str
    version: int
    description: str
    passes: list[str]
    exports: list[str]
    recipe: dict[str, Any]
    text: str  #: the recipe as it is written, in YAML


class PassView(View):
    """A pass that recipes may name, or one that the operator allows and that can't be used."""

    name: str
    description: str
    stage: str
    needs: str
    exports: list[str]  #: the formats that can carry its result
    package: str | None  #: that it comes from; None: it is one of Nightpress' own
    version: str | None  #: of that package
    problem: str | None  #: why it can't be used

    @classmethod
    def of(cls, options: type[PassOptions]) -> Self:
        name = str(options.model_fields["pass_"].default)
        provider = provider_of(name)
        return cls(
            name=name,
            description=inspect.cleandoc(options.__doc__ or "").partition("\n")[0],
            stage=options.stage,
            needs=options.needs,
            exports=sorted(options.exports),
            package=provider.package if provider else None,
            version=provider.version if provider else None,
            problem=None,
        )

    @classmethod
    def of_problem(cls, name: str, problem: str) -> Self:
        return cls(
            name=name, description="", stage="", needs="", exports=[], package=None, version=None, problem=problem
        )


class ValidateRequest(Request):
    """A recipe as a mapping or as YAML text, and optionally the model it is meant for."""

    recipe: dict[str, Any] | Annotated[str, Field(max_length=64 * 1024)]
    model: str | None = Field(None, min_length=1, max_length=128)


class ValidateView(View):
    plan: Plan
