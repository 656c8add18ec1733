"""Recipes on the wire."""

from typing import Annotated, Any

from pydantic import (
    Field,
)

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


class ValidateRequest(Request):
    """A recipe as a mapping or as YAML text, and optionally the model it is meant for."""

    recipe: dict[str, Any] | Annotated[str, Field(max_length=64 * 1024)]
    model: str | None = Field(None, min_length=1, max_length=128)


class ValidateView(View):
    plan: Plan
