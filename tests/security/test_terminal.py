"""No server can control the terminal: every subcommand runs behind a proxy that adds escape sequences to every string of an answer."""

import http.client
import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from nightpress.client.cli.main import app, main
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Progress
from nightpress.core.service.access.oidc.people import PeopleBook
from nightpress.core.service.access.oidc.sessions import Confirmed, SessionBook
from nightpress.core.service.compose import Resources
from nightpress.core.service.studies.searching import Searching
from tests.command import built_once
from tests.face import RECIPE, Face

#: Sequences for: title, clear screen, an 8-bit CSI, bell, hyperlink, clipboard, text direction, carriage return; and all of C0 and C1.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x1b]8;;http://x\x1b\\\x1b]52;c;eA==\x07\u202e\u2066\u200b\r\b" + "".join(
    map(chr, (*range(9), *range(11, 32), *range(127, 160)))
)
_ID = re.compile(r"[a-z]+_[0-9a-z]{20,}|np_\w+|[a-z0-9]{8}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT")

#: Subcommands that print nothing from a server, or only from one that the user started on this machine.
_OWN = {"up", "down", "web", "press", "profile", "demo", "doctor", "reproduce", "servers", "convert", "logout", "mcp"}


class Poisoner:
    """A proxy in front of the API. It appends the hostile text to each string of an answer.

    It leaves out strings with which the client could not read the answer: property names, enum values, times, and by default identifiers.
    """

    def __init__(self, port: int, document: dict[str, Any]) -> None:
        self.identifiers = False  #: whether identifiers get the text too: requests that refer to them then fail
        self._fixed = set(_constants(document))
        self._names = set(_property_names(document))
        poisoner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                content = poisoner.poison_body(answer.getheader("Content-Type", ""), answer.read())
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in {"content-length", "transfer-encoding", "connection", "content-encoding"}:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                server.close()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815 - as the library calls them

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def poison_body(self, kind: str, body: bytes) -> bytes:
        if "json" in kind and "ndjson" not in kind:
            return json.dumps(self.poison(json.loads(body))).encode() if body else body
        if "event-stream" in kind:
            return b"\n".join(self._poison_line(line) for line in body.split(b"\n"))
        return body

    def _poison_line(self, line: bytes) -> bytes:
        name, colon, value = line.partition(b": ")
        return name + colon + json.dumps(self.poison(json.loads(value))).encode() if name == b"data" else line

    def poison(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name if name in self._names else name + HOSTILE: self.poison(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.poison(item) for item in value]
        if not isinstance(value, str) or value in self._fixed or _TIME.match(value):
            return value
        return value if _ID.fullmatch(value) and not self.identifiers else value + HOSTILE


def _constants(schema: Any) -> Iterator[str]:
    """The fixed values (`enum` and `const`) of a schema, against which the client checks an answer."""
    if isinstance(schema, dict):
        yield from (text for text in [*schema.get("enum", ()), schema.get("const")] if isinstance(text, str))
        for value in schema.values():
            yield from _constants(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _constants(value)


def _property_names(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            yield from schema["properties"]
        for value in schema.values():
            yield from _property_names(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _property_names(value)


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    face = Face(tmp_path_factory.mktemp("face"), webhook_networks=["127.0.0.0/8"], destinations=["s3://models"])
    face.start()
    yield face
    face.close()


@pytest.fixture(scope="module")
def poisoner(face: Face) -> Iterator[Poisoner]:
    from nightpress.api.app import create_app
    from nightpress.core.handoff.report import Report

    document = {"api": create_app(face.settings).openapi(), "report": Report.model_json_schema()}
    poisoner = Poisoner(face.settings.api_port, document)
    yield poisoner
    poisoner.close()


@pytest.fixture(scope="module")
def commands(face: Face, bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Every subcommand that sends a request, with things that have a value in every field."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "texts.jsonl").write_text('{"text": "a"}\n' * 8)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    with face.client() as client:
        model = client.models.upload(bert_tiny, "mine").id
        data = client.data_sets.upload(folder / "texts.jsonl", "texts").id
        done = client.jobs.submit(model, RECIPE, labels={"team": "one"}, name="nightly").id
        claimed = face.claim()
        face.store.attempts.append_logs(claimed.lease, [("info", "a line"), ("error", "another")])
        face.store.attempts.record_event(claimed.lease, "checkpoint", {"step": 1, "strange": "word"})
        face.succeed(claimed)
        failed = client.jobs.submit(model, RECIPE).id
        face.fail(face.claim(), NightpressError(ErrorCode.INVALID_RECIPE, "It failed.", hint="Do this."))
        running = client.jobs.submit(model, RECIPE).id
        lease = face.claim().lease
        face.store.attempts.renew(
            lease, ttl_s=600, progress=Progress(phase="pressing", fraction=0.3, message="block 3")
        )
        client.schedules.create("nightly", "0 3 * * *", "mine", RECIPE)
        client.schedules.trigger("nightly")
        ended = client.studies.create("mine", {"size": "<= 60%"}, trials=2).id
        client.studies.cancel(ended)
        resources = Resources(face.settings, face.engine)
        Searching(
            resources.study_ledger, resources.jobs, resources.store, resources.models, lambda _queue: None
        ).advance()
        study = client.studies.create("mine", {"size": "<= 60%"}, trials=2).id
        hook = client.webhooks.create("http://127.0.0.1:9/hook", ["job.failed"]).webhook.id
        delivery = client.webhooks.test(hook).id
        sent = client.deliveries.create(done, ["s3://models/x"])[0].id
        sealed = client.credentials.create("hf://acme", {"token": "hf_secret"}).id
        (folder / "secrets").write_text("token=hf_other\n")
        person, _, _ = PeopleBook(face.engine).know({"iss": "https://login", "sub": "a", "name": "Ada"})
        book = SessionBook(face.engine, face.settings)
        book.begin(Confirmed(person, ["engineers"], None), "default", state="s", replaces=None)
        key = client.keys.create("other", ["jobs:read"]).record.id
    texts = [
        f"submit {model} -r int8-encoder", f"watch {done}", f"watch {failed}", f"wait {done}", f"wait {failed}", "ls", f"inspect {done}",
        f"inspect {failed}", f"inspect {running}", f"logs {done}", f"cancel {done}", "cancel --label none=such", f"retry {failed}",
        f"pull {done} --out {folder / 'pulled'}", f"pull mine --out {folder / 'latest'}", f"report {done}", f"cost {done}", "cost", f"compare {done} {done}",
        "workers", "queues", "whoami", "audit", "recipes", "recipes show int8-encoder", "recipes schema", "recipes passes",
        f"recipes validate {folder / 'recipe.json'} --model {model}", "models", f"models show {model}", "models show nothing",
        "models history mine", f"models promote mine {done}", f"models add {bert_tiny} --name second", "models rm nothing",
        "datasets", f"datasets show {data}", f"datasets add {folder / 'texts.jsonl'} --name more", "datasets rm nothing",
        "schedule", "schedule show nightly", "schedule edit nightly --cron 0_4_*_*_*", "schedule suspend nightly", "schedule resume nightly",
        "schedule trigger nightly", "schedule add later --cron 0_5_*_*_* --model mine --recipe int8-encoder", "schedule rm later",
        "webhooks", f"webhooks show {hook}", f"webhooks edit {hook} --off", f"webhooks rotate {hook}", f"webhooks test {hook}",
        f"webhooks deliveries {hook}", f"webhooks deliveries {hook} {delivery}", f"webhooks redeliver {hook} {delivery}",
        "webhooks add http://127.0.0.1:9/other -e job.failed", "webhooks rm whk_nothing",
        "deliveries", f"deliveries show {sent}", f"deliveries retry {sent}", f"deliveries cancel {sent}", f"deliveries add {done} s3://models/y",
        "deliveries of-model mine --to s3://models/z", "credentials", f"credentials show {sealed}", "signing-keys",
        f"credentials add hf://more --from {folder / 'secrets'}", f"credentials rotate {sealed} --from {folder / 'secrets'}",
        f"credentials rm {sealed}", f"verify {folder}",
        "keys", f"keys show {key}", "keys add more --scope jobs:read", f"keys rotate {key}", f"keys rm {key}",
        "sessions", "sessions rm ses_nothing", "login",
        "tenants", "tenants show default", "tenants quota default max_queued_jobs=5",
        "studies", f"studies show {study}", f"studies trials {study}", f"studies events {study}", f"studies watch {ended}", f"studies cancel {study}",
    ]  # fmt: skip
    search = ["search", "mine", "--gate", "size <= 60%"]
    return [search] + [[word.replace("_*", " *") if "*" in word else word for word in text.split()] for text in texts]


def subcommands() -> Iterator[tuple[str, ...]]:
    for name, command in typer.main.get_command(app).commands.items():
        below = getattr(command, "commands", None)
        yield from ((name, command) for command in below) if below else ((name,),)


@pytest.mark.slow
def test_every_subcommand_that_asks_a_server_is_tried(commands: list[list[str]]) -> None:
    tried = {tuple(command[:length]) for command in commands for length in (1, 2)}
    groups = {command[0] for command in commands if len(command) == 1}
    left = {subcommand for subcommand in subcommands() if subcommand not in tried and subcommand[0] not in _OWN}
    assert not {path for path in left if not (len(path) == 2 and path[1] in {"ls", "list"} and path[0] in groups)}


# Printed as JSON, all of an answer goes through the same encoder, identifiers as well.
@pytest.mark.parametrize(
    ("form", "identifiers"),
    [("text", False), ("text", True), ("json", False)],
    ids=["text", "text, identifiers too", "json"],
)
@pytest.mark.slow
def test_nothing_that_a_server_says_steers_the_terminal(
    face: Face,
    poisoner: Poisoner,
    commands: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    identifiers: bool,
    form: str,
) -> None:
    poisoner.identifiers = identifiers
    for name, value in face.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NIGHTPRESS_API_KEY", face.key)
    monkeypatch.setattr(typer.main, "get_command", built_once)
    monkeypatch.chdir(face.folder)
    showed = 0
    broke = []
    for command in commands:
        extra = ["--json"] if form == "json" else []
        monkeypatch.setattr(sys, "argv", ["nightpress", *command, "--api", poisoner.url, *extra])
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        strange = {hex(ord(letter)) for letter in out + err if not letter.isprintable() and letter != "\n"}
        assert not strange, (command, strange, out, err)
        showed += "owned" in out + err
        if "An unexpected error" in err or status == 2:
            broke.append((command, status, err.encode("ascii", "replace")[:500]))
    assert not broke, "\n".join(map(repr, broke))
    assert showed > len(commands) * 2 // 3, "what is hostile was shown, without what makes it so"
