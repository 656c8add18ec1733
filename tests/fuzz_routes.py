"""Every route of the API's OpenAPI document, with hostile paths, queries, headers and bodies."""

import hashlib
import json
import re
import time
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote_from_bytes

import httpx
from sqlalchemy import select

from nightpress.core.errors import ErrorCode
from nightpress.core.service.tables.registry import data_sets, models
from tests.face import RECIPE, Face
from tests.fuzz_readers import _ROWS
from tests.fuzz_values import any_text, any_value, as_json, mangled, spoiled

SLOW_S = 20.0  #: most seconds for a whole answer, on a machine that does other work too
_HEADERS = (
    "last-event-id", "if-match", "if-none-match", "idempotency-key", "prefer", "range", "if-range", "accept", "content-type",
    "traceparent", "x-request-id",
)  # fmt: skip
_KEYS = re.compile(r"/v1/(keys|admin)")  #: excluded: these routes could revoke the key that the other requests use
_CODES = {code.value for code in ErrorCode}


class Routes:
    """Sends random requests to an API that has a model, a finished job, a schedule and a webhook to refer to."""

    def __init__(self, face: Face, model: Path) -> None:
        self._face = face
        headers = {"Authorization": f"Bearer {face.key}"}
        self._client = httpx.Client(base_url=face.url, headers=headers, timeout=60, trust_env=False)
        with face.client() as client:
            made = client.models.upload(model)
            job = client.jobs.submit(made.id, RECIPE).id
            face.succeed(face.claim())
            hook = client.webhooks.create("http://127.0.0.1:9/", ["job.failed"]).webhook.id
            schedule = client.schedules.create("nightly", "0 2 * * *", made.name, "int8-weights").id
        self._things = [
            made.id,
            made.name,
            job,
            hook,
            schedule,
            "int8-encoder",
            "config.json",
            "compressed-tensors",
            "default",
            "1",
        ]
        document = self._client.get("/openapi.json").json()
        self._schemas = document["components"]["schemas"]
        self._operations = [
            (method, path, said)
            for path, operations in document["paths"].items()
            for method, said in operations.items()
            if method != "delete" and not (_KEYS.match(path) and method != "get")
        ]

    def attempt(self, dice: Random) -> int:
        """Send one request, or upload one data set. Returns the status.

        Raises AssertionError if an answer breaks the rules of tests/fuzz.py.
        """
        if dice.random() < 0.15:
            return self._bring(dice)
        method, path, said = dice.choice(self._operations)
        url = re.sub(r"\{\w+\}", lambda _: self._part(dice), path)
        parameters = said.get("parameters", [])
        asked = {
            parameter["name"]: self._part(dice)
            for parameter in parameters
            if parameter["in"] == "query" and dice.random() < 0.5
        }
        if asked:
            url += "?" + "&".join(f"{name}={value}" for name, value in asked.items())
        headers = {}
        for name in dice.sample(_HEADERS, 2):
            value = any_text(dice)[:2000].encode("latin-1", "replace")
            headers[name] = bytes(byte for byte in value if 32 <= byte != 127).strip()
        if b"event-stream" not in headers.get("accept", b""):
            headers.setdefault("accept", b"application/json")
        content = self._body(dice, said) if "requestBody" in said else None
        return self._ask(method, url, headers, content)

    def close(self) -> None:
        self._client.close()

    def check_rows(self) -> None:
        """Check that no completed upload is still `uploading`, and that the API's log has no traceback."""
        with self._face.engine.connect() as connection:
            for table in (models, data_sets):
                states = connection.execute(select(table.c.name, table.c.state)).all()
                assert not [name for name, state in states if name.startswith("fuzz-") and state == "uploading"]
        log = (self._face.folder / "api.log").read_text(errors="replace")
        assert "Traceback" not in log, log[log.index("Traceback") :][:4000]

    def _ask(self, method: str, url: str, headers: dict[str, bytes], content: bytes | None) -> int:
        sent = {"content-type": b"application/json", **headers} if content is not None else headers
        request = self._client.build_request(method.upper(), url, headers=sent, content=content)
        began = time.monotonic()
        try:
            with self._client.stream(request.method, request.url, headers=request.headers, content=content) as answer:
                status = answer.status_code
                kind = answer.headers.get("content-type", "")
                body = b"" if kind.startswith("text/event-stream") else answer.read()
        except (httpx.RemoteProtocolError, httpx.LocalProtocolError):
            return 0  # the client or the server rejected it as invalid HTTP
        said = f"{request.method} {url!r} {headers!r} {(content or b'')[:2000]!r}: {status} {body[:1000]!r}"
        assert status < 500 or (status == 503 and "broker" in body.decode()), said
        assert time.monotonic() - began < SLOW_S, said
        if status >= 400 and body != b"Invalid HTTP request received.":  # the server's answer before it has a request
            assert kind == "application/problem+json", said
            assert json.loads(body)["code"] in _CODES, said
        return status

    def _part(self, dice: Random) -> str:
        if dice.random() < 0.5:
            return dice.choice(self._things)
        return quote_from_bytes(any_text(dice)[:3000].encode("utf-8", "surrogatepass"), safe="")

    def _body(self, dice: Random, said: dict[str, Any]) -> bytes:
        content = said["requestBody"]["content"].get("application/json", {})
        examples = [example["value"] for example in content.get("examples", {}).values()]
        good: Any = dice.choice(examples) if examples else {"name": "x"}
        if isinstance(good, dict) and "model" in good:
            good = good | {"model": self._things[0]}
        spoilt = as_json(spoiled(dice, good)) if dice.random() < 0.8 else mangled(dice, as_json(good))
        return spoilt if dice.random() < 0.9 else as_json(any_value(dice))

    def _bring(self, dice: Random) -> int:
        """Upload a data set in three requests. Whatever its bytes, the last request must leave it `ready` or `failed`."""
        path = dice.choice(list(_ROWS))
        data = mangled(dice, _ROWS[path]) or b"x"
        if dice.random() < 0.3:
            path += ".gz"
        file = {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        made = self._client.post("/v1/datasets", json={"name": f"fuzz-{dice.randrange(10**9)}", "file": file})
        assert made.status_code == 201, made.text
        place = f"/v1/datasets/{made.json()['id']}"
        assert self._client.put(f"{place}/parts/1", params={"path": path}, content=data).status_code == 204
        status = self._ask("POST", f"{place}/complete", {}, None)
        state = self._client.get(place).json()["state"]
        assert state == ("ready" if status == 200 else "failed"), (path, data, status, state)
        return status
