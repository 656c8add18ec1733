"""The built-in recipes: one YAML file each in builtin/."""

from functools import cache
from importlib.resources import files

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.models import Recipe, load_recipe


@cache
def builtin_recipes() -> dict[str, Recipe]:
    """Return name → recipe, sorted by name."""
    folder = files("nightpress.core.recipes") / "builtin"
    recipes = [load_recipe(entry.read_text()) for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {recipe.name: recipe for recipe in sorted(recipes, key=lambda recipe: recipe.name)}


@cache
def builtin_text(name: str) -> str:
    """Return a built-in recipe's YAML text, which leaves out fields at their defaults."""
    return (files("nightpress.core.recipes") / "builtin" / f"{name}.yaml").read_text()


def get_recipe(name: str) -> Recipe:
    """Return a built-in recipe by name. Raises NightpressError(not_found), whose hint names the existing recipes."""
    recipes = builtin_recipes()
    if name not in recipes:
        raise NightpressError(
            ErrorCode.NOT_FOUND, f"There is no built-in recipe {name!r}.", hint=f"There are: {', '.join(recipes)}."
        )
    return recipes[name]
