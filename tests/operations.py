"""Every operation of the OpenAPI document, for tests that send a request to each."""

import re
from typing import Any, NamedTuple

import httpx

from tests.api import RunningApi

# The path parameters by what they name. A new parameter must be classified here first.
#: things of one tenant
_TENANTS_OWN = {
    "job_id",
    "reference",
    "key_id",
    "webhook_id",
    "study_id",
    "credential_id",
    "result_delivery_id",
    "session_id",
}
#: only for administrators: see test_only_an_administrator…
_ADMINS = {"tenant_id"}
_COMMON = {"name"}
_WITHIN = {"delivery_id": "msg_x", "number": "1", "format": "onnx", "path": "model.onnx"}
OPEN = {"/healthz", "/readyz", "/metrics", "/auth/provider"}
#: path of a POST that creates something → its body; a new one must be added here
BODIES: dict[str, Any] = {
    "/v1/jobs": {"model": "x", "recipe": "x"},
    "/v1/jobs:batch": {"jobs": [{"model": "x", "recipe": "x"}]},
    "/v1/jobs:cancel": {"labels": {"no": "job"}},
    "/v1/models": {"name": "other", "path": "/nowhere"},
    "/v1/datasets": {"name": "other", "path": "/nowhere"},
    "/v1/models/{reference}/promotions": {"job_id": "job_x"},
    "/v1/webhooks": {"url": "https://127.0.0.1/", "events": ["job.failed"]},
    "/v1/deliveries": {"job_id": "job_x", "destinations": ["s3://models/x"]},
    "/v1/credentials": {"prefix": "hf://acme", "secrets": {"token": "hf_secret"}},
    "/v1/credentials/{credential_id}/rotate": {"secrets": {"token": "hf_secret"}},
    "/v1/models/{reference}/destinations": {"destinations": ["s3://models/x"]},
    "/v1/keys": {"name": "other", "scopes": ["keys:write"]},
    "/v1/studies": {"model": "x", "gates": {"cosine": ">= 0.9"}},
    "/v1/schedules": {"name": "other", "cron": "0 2 * * *", "job": {"model": "x", "recipe": "x"}},
}


class Operation(NamedTuple):
    method: str
    path: str

    @property
    def kind(self) -> str:
        return self.path.split("/")[2]

    def at(self, identifier: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: _WITHIN.get(match[1], identifier), self.path)

    def send(self, client: httpx.Client, identifier: str, **kwargs: Any) -> httpx.Response:
        content: dict[str, Any] = {}
        if "/parts/" in self.path:
            content = {"params": {"path": "config.json"}, "content": b"x"}
        elif self.path.endswith("/validate"):
            content = {"json": {"recipe": "name: x"}}
        elif self.method == "PATCH":
            content = {"json": {}}
        elif self.method in {"POST", "PUT"} and self.path in BODIES:
            content = {"json": BODIES[self.path]}
        return client.request(self.method, self.at(identifier), **content, **kwargs)


def operations(api: RunningApi) -> list[Operation]:
    document = httpx.get(f"{api.url}/openapi.json", trust_env=False, timeout=60).json()
    return [Operation(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def on_things(api: RunningApi) -> list[Operation]:
    found = []
    for operation in operations(api):
        parameters = set(re.findall(r"\{(\w+)\}", operation.path))
        assert parameters <= _TENANTS_OWN | _ADMINS | _COMMON | _WITHIN.keys(), (
            f"classify the parameters of {operation}"
        )
        if parameters & _TENANTS_OWN:
            found.append(operation)
    assert len(found) >= 20
    return found
