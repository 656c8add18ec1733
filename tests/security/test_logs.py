"""S11: logs contain no key, no signature and no password, in the text format and in the JSON format."""

import json
import subprocess
import sys

import pytest

from tests.service import ROOT

SECRETS = {
    "a header": ("authorization: Bearer {}", "eyJhbGciOiJIUzI1NiJ9.e30.abc"),
    "a key of ours": ("the key np_a1b2c3d4_{} was tried", "R2w8cQyqk1b0v5x3Zt7n9u4m6s8e2a1d0f5g7h9j1k3a1b2c"),
    "a presigned address": ("GET https://s3.internal/b/k?X-Amz-Signature={}&x-id=GetObject", "3b7f0c9d8e7a6b5c"),
    "a presigned address's credential": ("PUT https://s3.internal/b/k?x-amz-credential={}", "AKIAIOSFODNN7EXAMPLE"),
    "a broker's address": ("cannot reach rediss://:{}@valkey.internal:6379/0", "hunter2"),
    "a database's address": ("cannot reach postgresql+psycopg://nightpress:{}@db.internal/np", "p%40ss:w0rd"),
    "a webhook's secret": ("signed with whsec_{}", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
}


@pytest.fixture(scope="module", params=["text", "json"])
def lines(request: pytest.FixtureRequest) -> list[str]:
    """The log of a process that logs each secret twice: in a message and in an exception's text."""
    program = (
        "import json, logging, sys\n"
        "from nightpress.core.logs import configure_logging\n"
        f"configure_logging('info', {request.param!r})\n"
        "for text in json.load(sys.stdin):\n"
        "    logging.getLogger('x').info('%s', text)\n"
        "    try:\n"
        "        raise RuntimeError(text)\n"
        "    except RuntimeError:\n"
        "        logging.getLogger('x').exception('it failed')\n"
    )
    texts = json.dumps([text.format(secret) for text, secret in SECRETS.values()])
    done = subprocess.run(
        [sys.executable, "-c", program], input=texts, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


@pytest.mark.parametrize("what", SECRETS)
def test_no_secret_is_logged(lines: list[str], what: str):
    text, secret = SECRETS[what]
    assert not [line for line in lines if secret in line]
    kept = text.partition("{}")[0].split()[0]
    assert [line for line in lines if kept in line and "***" in line], "the rest of the line is still of use"
