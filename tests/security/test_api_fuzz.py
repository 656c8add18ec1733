"""The whole API under schemathesis: unusual input gets a documented problem, never a crash, and answers match the OpenAPI document.

It runs twice: with random identifiers, and with identifiers of existing things, on the routes that name them. One check is left out: that input which is valid by its
schema is accepted. A schema can't say that a time zone exists, that a host name resolves, or that a cron expression ever fires.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress.core.service.access.keys import ALL_SCOPES, create_key
from tests.face import RECIPE, Face

_CHECKS = "positive_data_acceptance"
_SEED = 7
_KEYS = "^/v1/keys/"  #: routes of a single key. They may revoke the key that tries them, so they run apart
#: Routes that name a thing. All of schemathesis' phases try them with existing things; of the run with random identifiers, the phase
#: that covers each field of a request would try the same once more.
_THINGS = ("^/v1/jobs/", "^/v1/models/", "^/v1/schedules/", "^/v1/webhooks/", "^/v1/admin/tenants/", "^/v1/recipes/")


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    face = Face(tmp_path_factory.mktemp("fuzz"), webhook_networks=["127.0.0.0/8"])
    face.start()
    yield face
    face.close()


@pytest.fixture(scope="module")
def things(face: Face, bert_tiny: Path) -> dict[str, dict[str, str]]:
    """Pattern of paths → path parameters that name existing things."""
    with face.client() as client:
        model = client.models.upload(bert_tiny)
        job = client.jobs.submit(model.id, RECIPE).id
        face.succeed(face.claim())
        schedule = client.schedules.create("nightly", "0 2 * * *", "bert-tiny", "int8-weights").id
        hook = client.webhooks.create("http://127.0.0.1:9/", ["job.failed"]).webhook.id
        delivery = client.webhooks.test(hook).id
    names = (
        {"job_id": job, "format": "compressed-tensors", "path": "config.json"},
        {"reference": model.id},
        {"reference": schedule},
        {"webhook_id": hook, "delivery_id": delivery},
        {"tenant_id": "default"},
        {"name": "int8-encoder"},
    )
    return dict(zip(_THINGS, names, strict=True))


def fuzz(face: Face, key: str, *options: str, config: str = "") -> None:
    file = face.folder / "schemathesis.toml"
    file.write_text(config)
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    done = subprocess.run(
        [
            *(*command, "--config-file", str(file), "run", f"{face.url}/openapi.json", "--no-color"),
            *("-H", f"Authorization: Bearer {key}", "--phases", "examples,coverage,fuzzing"),
            *("--max-examples", "3", "--seed", str(_SEED), "--exclude-checks", _CHECKS),
            *("--suppress-health-check", "all", "--warnings", "off", *options),
        ],
        cwd=face.folder,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert "Traceback" not in (face.folder / "api.log").read_text()


@pytest.mark.slow
def test_strange_input_gets_a_documented_problem(face: Face):
    tried_below = f'[[operations]]\ninclude-path-regex = "{"|".join(_THINGS)}"\nexclude-method = "DELETE"\n'
    config = tried_below + "phases.coverage.enabled = false\n"
    fuzz(face, face.key, "--exclude-path-regex", _KEYS, config=config)
    with face.client() as client:
        assert "admin" in client.me().scopes, "the key no longer works: most of it was tried without one"


@pytest.mark.slow
def test_so_do_keys(face: Face):
    fuzz(face, create_key(face.engine, name="fuzz", scopes=ALL_SCOPES)[1], "--include-path-regex", _KEYS)


@pytest.mark.slow
def test_so_it_does_where_things_are_there(face: Face, things: dict[str, dict[str, str]]):
    operations = [
        f'[[operations]]\ninclude-path-regex = "{pattern}"\nexclude-method = "DELETE"\nparameters = {{ {_toml(names)} }}\n'
        for pattern, names in things.items()
    ]
    named = ("--include-path-regex", "|".join(things), "--exclude-method", "DELETE")
    fuzz(face, face.key, *named, config="\n".join(operations))
    with face.client() as client:
        assert any(found.retry_of for found in client.jobs.iterate()), "the requests named nothing that is there"


def _toml(names: dict[str, str]) -> str:
    return ", ".join(f'"path.{name}" = {json.dumps(value)}' for name, value in names.items())
