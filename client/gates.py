"""Gates that a caller adds to a recipe."""

from collections.abc import Mapping
from typing import Any

from nightpress.client.client import Client


def with_gates(client: Client, recipe: str | dict[str, Any], gates: Mapping[str, str]) -> str | dict[str, Any]:
    """The recipe with these gates in place of its own for the same figures. A built-in recipe is read from the service.

    gates: figure → bound, e.g. {"size": "<= 50%"}; without any the recipe stays as it is.
    """
    if not gates:
        return recipe
    content = client.recipes.get(recipe).recipe if isinstance(recipe, str) else recipe
    return {**content, "gates": {**content.get("gates", {}), **gates}}
