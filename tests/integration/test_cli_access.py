"""The subcommands for webhooks, keys, quotas, the audit log and several servers, with a real API."""

import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nightpress.client import ApiError, Client, ClientError
from nightpress.client.discovery import find_server
from nightpress.client.servers import servers_file
from tests.command import run
from tests.face import RECIPE, Face
from tests.service import ROOT


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    face = Face(tmp_path_factory.mktemp("face"), webhook_networks=["127.0.0.0/8"])
    face.start()
    yield face
    face.close()


def told(face: Face, *arguments: str, **more: Any) -> Any:
    done = run(face, *arguments, "--json", **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shown(face: Face, *arguments: str) -> str:
    done = run(face, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_webhooks_whole_life(face: Face):
    made = told(face, "webhooks", "add", "http://127.0.0.1:9/hook", "-e", "job.failed")
    hook = made["webhook"]["id"]
    assert made["secret"].startswith("whsec_")
    assert made["secret"] not in shown(face, "webhooks") + shown(face, "webhooks", "show", hook)
    edited = told(face, "webhooks", "edit", hook, "--off", "-e", "job.succeeded")
    assert (edited["enabled"], edited["events"], edited["url"]) == (False, ["job.succeeded"], "http://127.0.0.1:9/hook")
    rotated = run(face, "webhooks", "rotate", hook, "--overlap", "60")
    assert "whsec_" in rotated.stdout
    assert made["secret"] not in rotated.stdout
    delivery = told(face, "webhooks", "test", hook)["id"]
    assert [row["id"] for row in told(face, "webhooks", "deliveries", hook)] == [delivery]
    assert "webhook.test" in shown(face, "webhooks", "deliveries", hook, delivery)
    assert delivery in shown(face, "webhooks", "redeliver", hook, delivery)
    assert shown(face, "webhooks", "rm", hook) == f"{hook} is gone.\n"
    assert run(face, "webhooks", "show", hook).returncode == 5
    assert told(face, "webhooks") == []


@pytest.mark.slow
def test_a_channel_and_a_mailbox_are_webhooks_without_a_secret(face: Face):
    channel = ("webhooks", "add", "http://127.0.0.1:9/x", "--slack", "-e", "model.promoted", "--template", "$model")
    made = told(face, *channel)
    assert made["secret"] is None
    hook = made["webhook"]["id"]
    assert (made["webhook"]["kind"], made["webhook"]["events"]) == ("slack", ["model.promoted"])
    assert "$model" in shown(face, "webhooks", "show", hook)
    assert told(face, "webhooks", "edit", hook, "--template", "$model: $link")["template"] == "$model: $link"
    assert run(face, "webhooks", "edit", hook, "--template", "$nothing").returncode == 2
    assert run(face, "webhooks", "rotate", hook).returncode == 4
    refused = run(face, "webhooks", "add", "mailto:team@example.com")
    assert refused.returncode == 4
    assert "sends no e-mail" in refused.stderr
    shown(face, "webhooks", "rm", hook)


@pytest.mark.slow
def test_a_keys_whole_life(face: Face):
    made = told(face, "keys", "add", "nightly", "-s", "jobs:read", "-s", "jobs:write", "--days", "30")
    key = made["record"]["id"]
    with Client(face.url, made["key"]) as client:
        assert set(client.me().scopes) == {"jobs:read", "jobs:write"}
    assert "good until" in shown(face, "keys", "show", key)
    turned = run(face, "keys", "rotate", key, "--overlap", "0")
    successor = turned.stdout.splitlines()[-1]
    with Client(face.url, successor) as client:
        assert client.me().key_id != key
    listed = shown(face, "keys")
    assert made["key"] not in listed
    assert successor not in listed
    assert run(face, "keys", "rotate", key).returncode == 4, "a key that has ended has no successor"
    fresh = told(face, "keys", "add", "other", "-s", "jobs:read")["record"]["id"]
    assert shown(face, "keys", "rm", fresh) == f"{fresh} is revoked.\n"
    assert "revoked" in shown(face, "keys", "show", fresh)
    assert run(face, "keys", "add", "x", "-s", "root").returncode == 4


@pytest.mark.slow
def test_tenants_quotas_and_the_audit_log(face: Face):
    told(face, "keys", "add", "theirs", "-s", "jobs:read", "--tenant", "acme")
    assert [row["name"] for row in told(face, "keys", "--tenant", "acme")] == ["theirs"]
    assert "acme" in shown(face, "tenants")
    set_to = told(face, "tenants", "quota", "acme", "max_running_jobs=2", "max_storage_bytes=5000000000")
    assert set_to["quotas"]["max_running_jobs"] == 2
    assert "5.0 GB" in shown(face, "tenants", "show", "acme")
    assert told(face, "tenants", "quota", "acme", "max_running_jobs=")["own"]["max_running_jobs"] is None
    assert run(face, "tenants", "quota", "acme", "max_jobs=2").returncode == 2
    lines = run(face, "audit", "--json", "-n", "2").stdout.splitlines()
    assert [json.loads(line)["subject"] for line in lines] == ["/v1/admin/tenants/acme"] * 2
    assert "PATCH /v1/admin/tenants/{tenant_id}" in shown(face, "audit")
    who = shown(face, "whoami")
    assert "default" in who
    assert "max_queued_jobs" in who
    assert {row["name"] for row in told(face, "queues")} == {"cpu", "gpu"}
    assert "passes" in told(face, "recipes", "schema")["properties"]


@pytest.mark.slow
def test_a_models_name_goes_back(face: Face, bert_tiny: Path, tmp_path: Path):
    with face.client() as client:
        model = client.models.upload(bert_tiny, "walked").id
        jobs = []
        for _ in range(2):
            jobs.append(client.jobs.submit(model, RECIPE).id)
            face.succeed(face.claim())
    assert [row["job_id"] for row in told(face, "models", "history", "walked")] == jobs[::-1]
    assert jobs[0] in shown(face, "models", "promote", "walked", jobs[0])
    assert "manual" in shown(face, "models", "history", "walked")
    assert f"nightpress pull {jobs[0]}" in shown(face, "models", "history", "walked", "--atom")
    assert told(face, "pull", "walked", cwd=tmp_path)["job"] == jobs[0]
    (tmp_path / "notes.txt").write_text("A line of prose.\n" * 50)
    added = told(face, "datasets", "add", str(tmp_path / "notes.txt"))
    assert "notes" in shown(face, "datasets", "show", added["id"])


@pytest.mark.slow
def test_servers_have_names(face: Face, tmp_path: Path):
    home = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    added = run(face, "servers", "add", "office", face.url, stdin=face.key + "\n", **home)
    assert added.returncode == 0, added.stderr
    file = tmp_path / "config" / "nightpress" / "config.toml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert face.key not in added.stdout + added.stderr
    # From a shell without any other settings of the installation:
    elsewhere = {**home, "NIGHTPRESS_DATA_DIR": str(tmp_path / "none"), "NIGHTPRESS_API_PORT": "1"}
    assert run(face, "ls", **elsewhere).returncode == 4
    assert told(face, "whoami", "--profile", "office", **elsewhere)["tenant_id"] == "default"
    assert told(face, "whoami", NIGHTPRESS_PROFILE="office", **elsewhere)["tenant_id"] == "default"
    assert told(face, "servers", "use", "office", **home) == {"default": "office"}
    assert told(face, "whoami", **elsewhere)["tenant_id"] == "default"
    assert told(face, "servers", **home) == [{"name": "office", "api_url": face.url, "key": True, "default": True}]
    both = run(face, "ls", "--api", face.url, "--profile", "office", **home)
    assert (both.returncode, "not both" in both.stderr) == (6, True)
    unknown = run(face, "ls", "--profile", "nowhere", **home)
    assert (unknown.returncode, "Known: office" in unknown.stderr) == (6, True)
    assert run(face, "servers", "rm", "office", **home).returncode == 0
    assert told(face, "servers", **home) == []
    file.write_text("servers = 3")
    broken = run(face, "ls", **home)
    assert (broken.returncode, str(file) in broken.stderr) == (6, True)


def test_a_wrong_key_is_not_remembered(face: Face, tmp_path: Path):
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    for line in ("np_wrong\n", ""):
        assert run(face, "servers", "add", "office", face.url, stdin=line, **home).returncode in {4, 6}
    assert run(face, "servers", "add", "of.fice", face.url, stdin=face.key, **home).returncode == 6
    assert not (tmp_path / "nightpress").exists()


def test_this_machines_key_goes_to_no_other_machine(face: Face, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("NIGHTPRESS_API_KEY", "NIGHTPRESS_API_URL", "NIGHTPRESS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    assert find_server(face.settings, "http://127.0.0.1:1").key.value == face.key
    assert find_server(face.settings, "https://presses.example.com").key.value is None
    servers_file().parent.mkdir()
    servers_file().write_text('[servers.a]\napi_url = "https://presses.example.com"\napi_key = "np_a"\n')
    assert find_server(face.settings, profile="a").key.value == "np_a"
    assert find_server(face.settings, "http://127.0.0.1:1").key.value == face.key
    with pytest.raises(ClientError, match="Both an address and a profile"):
        find_server(face.settings, "http://127.0.0.1:1", profile="a")


def test_an_edit_of_what_somebody_else_changed_is_refused(face: Face):
    with face.client() as client:
        hook = client.webhooks.create("http://127.0.0.1:9/", ["job.failed"]).webhook
        client.webhooks.edit(hook.id, version=hook.version, enabled=False)
        with pytest.raises(ApiError) as refused:
            client.webhooks.edit(hook.id, version=hook.version, enabled=True)
        assert refused.value.code == "precondition_failed"
        client.webhooks.delete(hook.id)


@pytest.mark.parametrize(("typed", "offered"), [("sched", "schedule"), ("webhooks red", "redeliver")])
@pytest.mark.slow
def test_a_shell_completes_words(typed: str, offered: str):
    """Calls the command as the script of `--show-completion bash` does."""
    program = "import sys; sys.argv = ['nightpress']; from nightpress.client.cli.main import main; main()"
    words = f"nightpress {typed}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_NIGHTPRESS_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert offered in done.stdout.split(), done.stderr
