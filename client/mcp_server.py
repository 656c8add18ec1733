"""A server of the Model Context Protocol (modelcontextprotocol.io) over the client: an assistant submits, searches, reads and promotes.

It runs on the user's machine and speaks over standard input and output. Every tool is one or two requests to the API with the user's
own key, so that the key's tenant and scopes decide what is allowed.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from itertools import islice
from typing import Annotated, Any, ParamSpec, TypeVar

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field, ValidationError

from nightpress.client.client import Client
from nightpress.client.errors import ClientError
from nightpress.client.gates import with_gates
from nightpress.core.errors import NightpressError
from nightpress.core.version import VERSION

_INSTRUCTIONS = (
    "Nightpress compresses Transformer models in jobs that take minutes to hours, and measures every result against its source. "
    "Submit a job with a recipe, or search for the best recipe with a study. Both return at once: look again with get_job or get_study. "
    "A job's `verdict` says whether its result kept the recipe's gates; get_report has the figures with their intervals. "
    "An accepted result is promoted by itself; promote goes back to an earlier one."
)
_LONGEST_LIST = 200
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
_CHANGES = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)

P = ParamSpec("P")
T = TypeVar("T")
Document = dict[str, Any]
JobId = Annotated[str, Field(description="A job's id, `job_…`.")]
StudyId = Annotated[str, Field(description="A study's id, `std_…`.")]
Model = Annotated[str, Field(description="A model's id or name, as list_models shows them.")]
Limit = Annotated[int, Field(ge=1, le=_LONGEST_LIST, description="How many, newest first.")]
Gates = Annotated[
    Mapping[str, str],
    Field(
        description="Figure → bound, e.g. {'perplexity': '<= +1%', 'size': '<= 50%'}. A change is relative to the source."
    ),
]


def make_server(client: Client) -> MCPServer:
    """The server, with tools that use this client."""
    server = MCPServer("nightpress", instructions=_INSTRUCTIONS, version=VERSION, log_level="WARNING")
    for group, annotations in ((_reading(client), _READS), (_adding(client), _ADDS), (_changing(client), _CHANGES)):
        for tool in group:
            server.tool(annotations=annotations, structured_output=False)(_explained(tool))
    return server


def _reading(client: Client) -> list[Callable[..., Any]]:
    def list_models(limit: Limit = 50) -> list[Document]:
        """List the registered models."""
        return [_plain(model) for model in islice(client.models.iterate(), limit)]

    def list_recipes() -> list[Document]:
        """List the built-in recipes: what each does and for which kind of model."""
        return [_plain(recipe) for recipe in client.recipes.list()]

    def list_jobs(
        state: Annotated[
            str | None, Field(description="queued, running, cancelling, succeeded, failed or cancelled.")
        ] = None,
        model: Annotated[str | None, Field(description="Only jobs on this model: its id or name.")] = None,
        limit: Limit = 20,
    ) -> list[Document]:
        """List jobs, newest first."""
        found = client.jobs.iterate(states=[state] if state else [], model=model)
        return [_plain(job) for job in islice(found, limit)]

    def get_job(job_id: JobId) -> Document:
        """Get a job: its state, progress, verdict or error, and its artifacts when it has succeeded."""
        job = client.jobs.get(job_id)
        artifacts = client.jobs.artifacts(job_id) if job.state == "succeeded" else []
        shown = [{"format": item.format, "size": item.size, "consumer": item.consumer} for item in artifacts]
        return {**_plain(job), "artifacts": shown}

    def get_report(job_id: JobId) -> str:
        """Get the report of a job that has succeeded, as a Markdown card: size, quality with intervals, speed, before and after."""
        return client.jobs.drawn_report(job_id, "md")

    def list_studies(limit: Limit = 20) -> list[Document]:
        """List studies, newest first."""
        return [_plain(study) for study in islice(client.studies.iterate(), limit)]

    def get_study(study_id: StudyId) -> Document:
        """Get a study: its state and best trials so far and, when it has succeeded, its report with the winner and the front."""
        study = client.studies.get(study_id)
        report = _plain(client.studies.report(study_id)) if study.state == "succeeded" else None
        return {**_plain(study), "report": report}

    def list_promotions(model: Model, limit: Limit = 20) -> list[Document]:
        """List the results that a model's name has meant, newest first. The first is the present one."""
        return [_plain(promotion) for promotion in islice(client.models.promotions(model), limit)]

    return [list_models, list_recipes, list_jobs, get_job, get_report, list_studies, get_study, list_promotions]


def _adding(client: Client) -> list[Callable[..., Any]]:
    def submit_job(
        model: Model,
        recipe: Annotated[str | Document, Field(description="A built-in recipe's name, or a recipe as an object.")],
        gates: Annotated[
            Gates | None, Field(description="Bounds in place of the recipe's own for these figures.")
        ] = None,
        name: Annotated[str, Field(description="A title for the job.")] = "",
        labels: Annotated[dict[str, str] | None, Field(description="Labels to find the job by.")] = None,
        promote: Annotated[bool, Field(description="Whether an accepted result becomes the model's latest.")] = True,
    ) -> Document:
        """Queue a job: a recipe on a model. Returns at once; get_job says how it goes."""
        wanted = with_gates(client, recipe, gates or {})
        job = client.jobs.submit(model, wanted, name=name, labels=labels or {}, promote=promote)
        return _plain(job)

    def search(
        model: Model,
        gates: Gates,
        minimize: Annotated[str, Field(description="size, latency, decode or memory.")] = "size",
        trials: Annotated[int, Field(ge=1, description="Recipes to try at most.")] = 40,
        hours: Annotated[float, Field(gt=0, description="Hours after which the search ends.")] = 24.0,
        name: Annotated[str, Field(description="A title for the study.")] = "",
    ) -> Document:
        """Begin a study: find the smallest or fastest form of a model that keeps the gates, by trying many recipes on all workers."""
        return _plain(client.studies.create(model, gates, minimize=minimize, trials=trials, hours=hours, name=name))

    return [submit_job, search]


def _changing(client: Client) -> list[Callable[..., Any]]:
    def promote(model: Model, job_id: JobId) -> Document:
        """Let a model's name mean another accepted job's result, e.g. to go back. Deployments that follow the name switch to it."""
        return _plain(client.models.promote(model, job_id))

    def cancel_job(job_id: JobId) -> Document:
        """Cancel a job. A finished job stays as it is."""
        return _plain(client.jobs.cancel(job_id))

    def cancel_study(study_id: StudyId) -> Document:
        """Cancel a study and its trials."""
        return _plain(client.studies.cancel(study_id))

    return [promote, cancel_job, cancel_study]


def _explained(tool: Callable[P, T]) -> Callable[P, T]:
    """The tool, with errors that say what happened and what to do, in place of a crash."""

    @wraps(tool)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return tool(*args, **kwargs)
        except (ClientError, NightpressError) as error:
            raise ToolError(f"{error.message} {error.hint}".strip()) from error
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise ToolError(f"The request is not valid: {wrong}") from error

    return call


def _plain(view: Any) -> Document:
    return dict(view.model_dump(mode="json"))
