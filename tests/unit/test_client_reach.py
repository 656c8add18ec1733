"""Every operation of the API has a method in both Python clients and a command, or is listed here with the reason why not."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from nightpress import AsyncClient, Client
from nightpress.api.app import create_app
from nightpress.client import (
    access,
    calls,
    delivery_calls,
    events,
    registered,
    resources,
    schedule_calls,
    studies,
    study_calls,
    uploads,
)
from nightpress.client.calls import Call
from nightpress.client.cli.main import app
from nightpress.client.methods import Answering, Iterating, Resource
from nightpress.core.settings import Settings
from nightpress.core.wire.jobs import JobCreate, JobFilter
from nightpress.core.wire.models import DataSetCreate, ModelCreate

#: operation → the command that sends it. A new operation must be added here, or to LEFT_OUT with a reason.
COMMANDS = {
    "create_job": "submit",
    "list_jobs": "ls",
    "get_job": "inspect",
    "cancel_job": "cancel",
    "cancel_jobs": "cancel",
    "retry_job": "retry",
    "job_events": "watch",
    "job_logs": "logs",
    "job_artifacts": "inspect",
    "artifact_file": "pull",
    "artifact_attestation": "pull",
    "list_signing_keys": "signing-keys",
    "job_trackers": "inspect",
    "job_report": "report",
    "job_report_json": "pull",
    "job_cost": "cost",
    "get_spending": "cost",
    "job_report_html": "report",
    "job_report_markdown": "report",
    "create_schedule": "schedule add",
    "list_schedules": "schedule",
    "get_schedule": "schedule show",
    "edit_schedule": "schedule edit",
    "delete_schedule": "schedule rm",
    "suspend_schedule": "schedule suspend",
    "resume_schedule": "schedule resume",
    "trigger_schedule": "schedule trigger",
    "list_runs": "schedule show",
    "create_study": "search",
    "list_studies": "studies",
    "get_study": "studies show",
    "list_trials": "studies trials",
    "get_study_report": "studies show",
    "study_trackers": "studies show",
    "study_events": "studies watch",
    "cancel_study": "studies cancel",
    "create_model": "models add",
    "list_models": "models",
    "get_model": "models show",
    "get_possible": "models show",
    "list_model_uploads": "models add",
    "send_model_part": "models add",
    "complete_model": "models add",
    "delete_model": "models rm",
    "latest": "pull",
    "history": "models history",
    "promotions_atom": "models history",
    "promote": "models promote",
    "create_data_set": "datasets add",
    "list_data_sets": "datasets",
    "get_data_set": "datasets show",
    "list_data_set_uploads": "datasets add",
    "send_data_set_part": "datasets add",
    "complete_data_set": "datasets add",
    "delete_data_set": "datasets rm",
    "list_passes": "recipes passes",
    "list_recipes": "recipes",
    "recipe_schema": "recipes schema",
    "get_recipe": "recipes show",
    "validate_recipe": "recipes validate",
    "list_workers": "workers",
    "list_queues": "queues",
    "create_webhook": "webhooks add",
    "list_webhooks": "webhooks",
    "get_webhook": "webhooks show",
    "edit_webhook": "webhooks edit",
    "delete_webhook": "webhooks rm",
    "rotate_secret": "webhooks rotate",
    "test_webhook": "webhooks test",
    "list_deliveries": "webhooks deliveries",
    "get_delivery": "webhooks deliveries",
    "redeliver": "webhooks redeliver",
    "deliver_result": "deliveries add",
    "list_result_deliveries": "deliveries",
    "get_result_delivery": "deliveries show",
    "cancel_delivery": "deliveries cancel",
    "retry_delivery": "deliveries retry",
    "get_destinations": "deliveries of-model",
    "set_destinations": "deliveries of-model",
    "create_credential": "credentials add",
    "list_credentials": "credentials",
    "get_credential": "credentials show",
    "rotate_credential": "credentials rotate",
    "delete_credential": "credentials rm",
    "list_keys": "keys",
    "create_key": "keys add",
    "get_key": "keys show",
    "rotate_key": "keys rotate",
    "revoke_key": "keys rm",
    "me": "whoami",
    "sign_in_provider": "login",
    "list_sessions": "sessions",
    "end_session": "sessions rm",
    "list_tenants": "tenants",
    "get_tenant": "tenants show",
    "change_tenant": "tenants quota",
    "list_audit": "audit",
    "readyz": "doctor",
}
LEFT_OUT = {
    "healthz": "for load balancers; a client asks /readyz",
    "metrics": "for Prometheus",
}
#: Operations without a command: a shell loop over single jobs does the same and shows the outcome of each job.
FOR_PROGRAMS = {"create_jobs"}
#: Operations whose URLs come from an answer of the service: client/transfers.py sends these requests.
BY_ADDRESS = {"send_model_part", "send_data_set_part", "artifact_file"}

_ARGUMENTS: dict[str, Any] = {
    "events": ["job.failed"],
    "scopes": ["jobs:read"],
    "url": "https://example.com/",
    "cron": "0 2 * * *",
    "gates": {"size": "<= 50%"},
    "jobs": [JobCreate(model="x", recipe="x")],
    "wanted": JobFilter(all=True),
    "destinations": ["s3://bucket/folder"],
    "prefix": "hf://acme",
    "secrets": {"token": "x"},
}
#: Arguments that a function can be called without, but not the operation.
_OPTIONAL = {"create_schedule": {"recipe": "x"}}
_CHOICES = {"kind": ("models", "datasets"), "form": ("html", "md", "json")}


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Operation id → (method, path)."""
    document = create_app(Settings(_env_file=None, data_dir=tmp_path_factory.mktemp("np"))).openapi()
    found = [
        (operation["operationId"], (method.upper(), path))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(found) == len(dict(found)), "two operations have one name"
    return dict(found)


def makers(module: ModuleType) -> dict[str, FunctionType]:
    """The functions of a module that return a Call."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and str(function.__annotations__.get("return", "")).startswith("nightpress.client.calls.Call[")
        and name != "post"
    }


MAKERS = makers(calls) | makers(access) | makers(study_calls) | makers(delivery_calls) | makers(schedule_calls)


def made_by(maker: FunctionType) -> Iterator[Call[Any]]:
    """A call for each path that the function can make."""
    needed = [
        parameter.name
        for parameter in inspect.signature(maker).parameters.values()
        if parameter.default is parameter.empty
    ]
    arguments = {name: _ARGUMENTS.get(name, "x") for name in needed if name not in {"fields", "changes", "quotas"}}
    if "request" in arguments:
        arguments["request"] = (ModelCreate if "model" in maker.__name__ else DataSetCreate)(name="x")
    arguments |= _OPTIONAL.get(maker.__name__, {})
    chosen = next((name for name in _CHOICES if name in arguments), None)
    for value in _CHOICES[chosen] if chosen else ():
        yield maker(**{**arguments, chosen: value})
    if chosen is None:
        yield maker(**arguments)


def operation_of(call: Call[Any], operations: dict[str, tuple[str, str]]) -> set[str]:
    """The operations that a call may reach. A literal path takes precedence over a pattern that also matches."""
    exact = {name for name, operation in operations.items() if operation == (call.method, call.path)}
    return exact or {
        name
        for name, (method, path) in operations.items()
        if method == call.method and re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", path), call.path)
    }


@pytest.mark.slow
def test_every_operation_has_a_call(operations: dict[str, tuple[str, str]]):
    reached = {name for maker in MAKERS.values() for call in made_by(maker) for name in operation_of(call, operations)}
    assert operations.keys() - reached == LEFT_OUT.keys() | BY_ADDRESS
    for maker in MAKERS.values():
        for call in made_by(maker):
            assert len(operation_of(call, operations)) == 1, call.path


def test_the_clients_make_every_call():
    kinds = [kind for _, kind in inspect.getmembers(resources, inspect.isclass) if issubclass(kind, Resource)]
    methods = [method for kind in kinds for method in vars(kind).values()]
    used = {method.described.__name__ for method in methods if isinstance(method, Answering | Iterating)}
    used |= {
        name
        for module in (resources, registered, schedule_calls, studies, uploads, events)
        for code in _code_of(module)
        for name in code.co_names
    }
    assert not MAKERS.keys() - used


def test_both_clients_offer_the_same():
    def offered(resource: object) -> dict[str, list[str]]:
        members = {name: getattr(resource, name) for name in dir(resource) if not name.startswith("_")}
        methods = {
            name: list(inspect.signature(member).parameters) for name, member in members.items() if callable(member)
        }
        for name, member in members.items():
            if isinstance(member, Resource):
                methods |= {f"{name}.{method}": parameters for method, parameters in offered(member).items()}
        return methods

    both, awaited = offered(Client("http://127.0.0.1:1")), offered(AsyncClient("http://127.0.0.1:1"))
    assert both.pop("close") == awaited.pop("aclose") == []
    assert both == awaited
    assert both["jobs.wait"] == ["job_id", "timeout_s", "poll_s", "patience_s", "on_update"]


def test_every_operation_has_a_command(operations: dict[str, tuple[str, str]]):
    assert operations.keys() == COMMANDS.keys() | LEFT_OUT.keys() | FOR_PROGRAMS
    there = set(_words(get_command(app), ()))
    assert not set(COMMANDS.values()) - there


def _words(command: Any, words: tuple[str, ...]) -> Iterator[str]:
    yield " ".join(words)
    if isinstance(command, TyperGroup):
        for name, subcommand in command.commands.items():
            yield from _words(subcommand, (*words, name))


def _code_of(module: ModuleType) -> Iterator[CodeType]:
    assert module.__file__ is not None
    waiting = [compile(Path(module.__file__).read_text(), module.__file__, "exec")]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
