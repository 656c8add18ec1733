"""`nightpress recipes …`: list, show and check recipes. Also how every command reads a recipe that it is given."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from nightpress.client.cli import output
from nightpress.client.cli.models import print_possible
from nightpress.client.cli.session import Session, takes_session
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import Plan
from nightpress.core.recipes.yamlfile import read_yaml

recipes = typer.Typer(
    invoke_without_command=True, help="Recipes: list the built-in ones, show, validate, print the schema."
)


def add_to(app: typer.Typer) -> None:
    app.add_typer(recipes, name="recipes", rich_help_panel="Service")


def read_recipe(recipe: str) -> str | dict[str, Any]:
    """The name of a built-in recipe as it is, or the content of a recipe file as a mapping.

    A pass that is unknown here is left for others to judge: a service may have packages that this machine hasn't.
    Raises NightpressError(invalid_recipe) for a file that is not valid, and BadParameter where there is no such file.
    """
    path = Path(recipe)
    if not path.is_file():
        if path.suffix in {".yaml", ".yml", ".json"} or "/" in recipe:
            raise typer.BadParameter(f"There is no file {recipe}.", param_hint="--recipe")
        return recipe
    text = path.read_text()
    mapping: dict[str, Any] = read_yaml(text)
    parse_recipe(mapping, for_a_service=True)
    return mapping


@recipes.callback()
@takes_session
def list_recipes(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = client.recipes.list()
    if session.json:
        output.print_json(found)
        return
    rows = [(recipe.name, ", ".join(recipe.passes), ", ".join(recipe.exports), recipe.description) for recipe in found]
    output.print_table(("recipe", "passes", "exports", ""), rows)


@recipes.command("show")
@takes_session
def show_recipe(session: Session, name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a built-in recipe as YAML, as a start for your own."""
    with session.client() as client:
        found = client.recipes.get(name)
    if session.json:
        output.print_json(found)
    else:
        output.say(yaml.safe_dump(found.recipe, sort_keys=False, allow_unicode=False).rstrip())


@recipes.command("schema")
@takes_session
def recipe_schema(session: Session) -> None:
    """Print the JSON schema of a recipe. Editors check a recipe against it."""
    with session.client() as client:
        output.print_json(client.recipes.schema())


@recipes.command("passes")
@takes_session
def list_passes(session: Session) -> None:
    """List the passes that a recipe may name: the built-in ones, and those of packages that the service allows."""
    with session.client() as client:
        found = client.recipes.passes()
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            known.name,
            f"{known.package} {known.version}" if known.package else "",
            known.stage,
            known.problem or known.description,
        )
        for known in found
    ]
    output.print_table(("pass", "package", "stage", ""), rows)


@recipes.command("validate")
@takes_session
def validate_recipe(
    session: Session,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a built-in recipe's name.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model to press: adds an estimate of memory and time.")
    ] = None,
) -> None:
    """Check a recipe and print its plan: the steps, the queue and, with a model, what it will take."""
    chosen = read_recipe(recipe)
    with session.client() as client:
        mapping = client.recipes.get(chosen).recipe if isinstance(chosen, str) else chosen
        plan = client.recipes.validate(mapping, model)
        possible = client.models.possible(model) if model is not None and not session.json else []
    if session.json:
        output.print_json(plan)
        return
    _print_plan(plan)
    print_possible(possible)


def _print_plan(plan: Plan) -> None:
    output.say(f"{plan.recipe.name} is valid; its jobs go to the queue {plan.queue}: {plan.queue_reason}", "green")
    if plan.gpus_reason:
        output.say(f"It holds {plan.gpus} GPU{'s' * (plan.gpus > 1)}: {plan.gpus_reason}")
    output.print_table(("", "step", ""), [(step.kind, step.name, step.detail) for step in plan.steps])
    if (estimate := plan.estimate) is not None:
        cores = "a core" if estimate.threads == 1 else f"{estimate.threads} cores"
        gpus = "a GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs"
        device = f"{cores} with {gpus}" if plan.queue == "gpu" else cores
        sizes = ", ".join(f"{name} {output.size_text(size)}" for name, size in estimate.output_bytes.items())
        output.print_fields(
            [
                ("memory", output.size_text(estimate.memory_bytes)),
                (
                    "memory of each GPU" if plan.gpus > 1 else "GPU memory",
                    output.size_text(estimate.gpu_bytes) if estimate.gpu_bytes else None,
                ),
                ("disk", output.size_text(estimate.disk_bytes)),
                ("time", f"about {output.duration_text(estimate.seconds)} on {device}"),
                ("result", sizes),
            ]
        )
    for warning in plan.warnings:
        output.say(f"warning: {warning}", "yellow")
