"""Recipes: the built-in ones, the schema, and the check and plan of a recipe."""

from typing import Annotated, Any

from fastapi import APIRouter, Body
from starlette.responses import JSONResponse, Response

from nightpress.api.deps import JobsReader, Services, ServicesDep
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.core.errors import ErrorCode
from nightpress.core.recipes.builtins import builtin_recipes, builtin_text
from nightpress.core.recipes.builtins import get_recipe as get_builtin
from nightpress.core.recipes.models import Recipe, load_recipe, parse_recipe
from nightpress.core.recipes.passes import catalog
from nightpress.core.recipes.plan import Plan, make_plan
from nightpress.core.wire.base import Page
from nightpress.core.wire.recipes import PassView, RecipeView, ValidateRequest, ValidateView

router = APIRouter(prefix="/v1/recipes", tags=["recipes"], route_class=OnceRoute)

_EXAMPLES = {
    "mapping": {
        "summary": "A mapping, planned for a model",
        "value": {
            "model": "all-minilm-l6-v2",
            "recipe": {
                "name": "my-int8",
                "passes": [{"pass": "weight-only", "bits": 8}],
                "exports": ["compressed-tensors"],
            },
        },
    },
    "YAML": {
        "summary": "YAML text, without a model",
        "value": {"recipe": "name: half\npasses: [{pass: magnitude, sparsity: 0.5}]\nexports: [safetensors]\n"},
    },
}


@router.get("", response_model=Page[RecipeView], summary="List the built-in recipes")
async def list_recipes(_caller: JobsReader) -> Response:
    return answer(Page[RecipeView](items=[_view(recipe) for recipe in builtin_recipes().values()]))


@router.get("/schema", summary="Get the JSON schema of a recipe", response_model=dict[str, Any])
async def recipe_schema(_caller: JobsReader) -> Response:
    return JSONResponse(Recipe.model_json_schema(by_alias=True))


@router.get("/passes", response_model=Page[PassView], summary="The passes that a recipe may name")
async def list_passes(_caller: JobsReader) -> Response:
    found = [PassView.of(options) for options in catalog.pass_types()]
    found += [PassView.of_problem(name, problem) for name, problem in catalog.faults().items()]
    return answer(Page[PassView](items=found))


@router.get(
    "/{name}", response_model=RecipeView, summary="Get a built-in recipe", responses=documented(ErrorCode.NOT_FOUND)
)
async def get_recipe(name: str, _caller: JobsReader) -> Response:
    return answer(_view(get_builtin(name)))


@router.post(
    "/validate",
    response_model=ValidateView,
    summary="Check a recipe and plan it: steps, queue, warnings and, with a model, an estimate",
    responses=documented(
        ErrorCode.INVALID_REQUEST,
        ErrorCode.INVALID_RECIPE,
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        ErrorCode.NOT_FOUND,
        ErrorCode.CONFLICT,
    ),
)
async def validate_recipe(
    caller: JobsReader,
    services: ServicesDep,
    body: Annotated[ValidateRequest, Body(openapi_examples=_EXAMPLES)],
) -> Response:
    recipe = await services.parse(_read, body.recipe)
    return answer(ValidateView(plan=await services.call(_plan, services, caller.tenant_id, recipe, body.model)))


def _read(recipe: dict[str, Any] | str) -> Recipe:
    return load_recipe(recipe) if isinstance(recipe, str) else parse_recipe(recipe)


def _plan(services: Services, tenant_id: str, recipe: Recipe, model: str | None) -> Plan:
    if model is None:
        return make_plan(recipe)
    return services.resources.jobs.plan(recipe, services.resources.models.get(tenant_id, model).id)


def _view(recipe: Recipe) -> RecipeView:
    return RecipeView(
        name=recipe.name,
        version=recipe.version,
        description=recipe.description,
        passes=[step.name for step in recipe.passes],
        exports=[export.name for export in recipe.exports],
        recipe=recipe.model_dump(mode="json"),
        text=builtin_text(recipe.name),
    )
