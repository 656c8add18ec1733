"""Reads a job's recipe, which another process has checked, and detects recipes that this worker can't run."""

from pydantic import ValidationError

from nightpress.core.errors import ErrorCode
from nightpress.core.recipes.models import Recipe, unknown_pass
from nightpress.core.service.jobs.records import Job
from nightpress.core.version import VERSION
from nightpress.worker.fitness import MachineFaultError


def read_recipe(job: Job) -> Recipe:
    """A job's recipe.

    Raises MachineFaultError for a recipe that a newer release wrote, or that has a pass which is not allowed on this worker. Another worker
    then gets the job.
    """
    try:
        return Recipe.model_validate(job.recipe)
    except ValidationError as error:
        first = error.errors()[0]
        if (unknown := unknown_pass(first)) is not None:
            why, hint = unknown
            raise MachineFaultError(
                ErrorCode.INTERNAL,
                f"This worker can't run the job: {why}.",
                hint=hint,
                reason=f"the worker lacks a pass: {why}",
            ) from error
        raise MachineFaultError(
            ErrorCode.INTERNAL,
            f"The recipe says something that this worker's release does not know: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            hint="Upgrade the workers to the API's release.",
            reason=f"the worker's release, {VERSION}, is older than the API's",
        ) from error
