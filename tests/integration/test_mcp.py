"""`nightpress mcp`, spoken to by the mcp library's own client over standard input and output, in front of a real API."""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from mcp import Client as McpClient
from mcp import StdioServerParameters

from nightpress.core.service.access.keys import create_key
from tests.face import RECIPE, Face
from tests.models import bert_tiny_dir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    folder = tmp_path_factory.mktemp("mcp")
    model = bert_tiny_dir(folder / "models")
    face = Face(folder, model_roots=[model.parent])
    face.start()
    with face.client() as client:
        client.models.register(str(model), "tiny")
    yield face
    face.close()


def ask(face: Face, *calls: tuple[str, dict[str, Any]], key: str | None = None) -> list[Any]:
    """Start the server and call tools, in order. Returns each answer: a document, a text, or the error's text as an exception's value."""
    environment = {"PATH": os.environ["PATH"], "NIGHTPRESS_API_URL": face.url, "NIGHTPRESS_API_KEY": key or face.key}
    command = StdioServerParameters(
        command=sys.executable, args=["-m", "nightpress.client.cli.main", "mcp"], env=environment, cwd=face.folder
    )

    async def talk() -> list[Any]:
        answers: list[Any] = []
        async with McpClient(command) as client:
            for name, arguments in calls:
                if name == "tools":
                    answers.append((await client.list_tools()).tools)
                    continue
                result = await client.call_tool(name, arguments)
                text = "\n".join(part.text for part in result.content if part.type == "text")
                answers.append(Refused(text) if result.is_error else text)
        return answers

    return anyio.run(talk)


class Refused(str):
    """The text of a tool's error."""


def test_an_assistant_submits_reads_and_promotes(face: Face) -> None:
    submit = ("submit_job", {"model": "tiny", "recipe": RECIPE, "gates": {"size": "<= 90%"}, "labels": {"by": "mcp"}})
    tools, models, recipes, made = ask(face, ("tools", {}), ("list_models", {}), ("list_recipes", {}), submit)
    assert {tool.name for tool in tools} == {
        "list_models", "list_recipes", "list_jobs", "get_job", "get_report", "list_studies", "get_study",
        "list_promotions", "submit_job", "search", "promote", "cancel_job", "cancel_study",
    }  # fmt: skip
    hints = {tool.name: tool.annotations for tool in tools}
    assert hints["get_report"].read_only_hint
    assert hints["promote"].destructive_hint
    assert not hints["submit_job"].destructive_hint
    assert '"name": "tiny"' in models
    assert "int8-encoder" in recipes
    job = json.loads(made)
    assert (job["state"], job["labels"]) == ("queued", {"by": "mcp"})
    assert job["recipe"]["gates"] == {"size": "<= 90%"}, "in place of the recipe's own"

    claimed = face.claim()
    assert claimed.job.id == job["id"]
    face.succeed(claimed)
    with face.client() as client:
        second = client.jobs.submit("tiny", RECIPE).id
    face.succeed(face.claim())
    seen, report, listed, promoted, history, *refused = ask(
        face,
        ("get_job", {"job_id": job["id"]}),
        ("get_report", {"job_id": job["id"]}),
        ("list_jobs", {"state": "succeeded", "model": "tiny", "limit": 1}),
        ("promote", {"model": "tiny", "job_id": job["id"]}),
        ("list_promotions", {"model": "tiny", "limit": 2}),
        ("get_job", {"job_id": "job_none"}),
        ("search", {"model": "tiny", "gates": {"beauty": ">= 3"}}),
        ("submit_job", {"model": "tiny", "recipe": "no-such-recipe"}),
    )
    assert json.loads(seen)["verdict"] == "accepted"
    assert json.loads(seen)["artifacts"][0]["format"] == "compressed-tensors"
    assert report == "# report"
    assert json.loads(listed)["id"] == second
    assert json.loads(promoted)["job_id"] == job["id"]
    assert job["id"] in history
    assert all(isinstance(answer, Refused) for answer in refused)
    for answer, why in zip(refused, ("no such job", "beauty", "no-such-recipe"), strict=True):
        assert why in answer


def test_the_callers_scopes_decide(face: Face) -> None:
    _, reader = create_key(face.engine, name="reader", scopes=["jobs:read", "models:read"])
    [refused] = ask(face, ("submit_job", {"model": "tiny", "recipe": RECIPE}), key=reader)
    assert isinstance(refused, Refused)
    assert "jobs:write" in refused
