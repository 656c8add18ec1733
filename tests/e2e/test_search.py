"""A search on a real model with a real worker, by the command line: trials, the last measurement, the report, and how to take the winner."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nightpress.client.cli.main import app
from nightpress.worker.control import Control
from tests.api import serve
from tests.patience import slowness
from tests.service import Service

SPACE = """
- name: rounded
  passes:
    - {pass: weight-only, bits: {choice: [2, 8]}, group_size: 64, embeddings: true}
  exports: [compressed-tensors]
"""


def test_a_search_on_a_real_model(tmp_path: Path, sqlite_url: str, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch):
    service = Service(tmp_path, sqlite_url, lease_ttl_s=20, model_roots=[bert_tiny.parent])
    slot, _ = service.slot(None, memory=4 * 1024**3)
    (tmp_path / "space.yaml").write_text(SPACE)
    wanted = ["--minimize", "size", "--gate", "centred_cosine >= 0.9", "--space", str(tmp_path / "space.yaml")]
    sparing = ["--trials", "2", "--parallel", "1", "--samples", "8", "--length", "16", "--name", "first search"]
    over = threading.Event()
    with serve(service.settings) as api:
        monkeypatch.setenv("NIGHTPRESS_API_URL", api.url)
        monkeypatch.setenv("NIGHTPRESS_API_KEY", api.key())
        control = Control(api.services.resources, lambda _queue: None)

        def fleet() -> None:
            while not over.wait(0.1):
                control.tick()
                slot.serve()

        thread = threading.Thread(target=fleet)
        thread.start()
        try:
            ended = CliRunner().invoke(app, ["search", str(bert_tiny), *wanted, *sparing, "--wait", "--json"])
        finally:
            over.set()
            thread.join()
            control.close()
            slot.close(timeout=10 * slowness())
        assert ended.exit_code == 0, ended.output
        told = json.loads(ended.stdout)
        study, report = told["study"], told["report"]
        check_the_study(service, study, report)
        check_the_commands(study)
        newest = CliRunner().invoke(app, ["pull", "bert-tiny", "--out", str(tmp_path / "winner")])
        assert newest.exit_code == 0, newest.output
        assert list((tmp_path / "winner").rglob("*.safetensors"))
    service.close()


def check_the_study(service: Service, study: dict[str, Any], report: dict[str, Any]) -> None:
    assert (study["state"], study["verdict"], study["proposed"], study["told"]) == ("succeeded", "accepted", 3, 3)
    assert study["counts"] == {"kept": 1, "missed": 1}
    assert study["cpu_seconds"] > 1
    assert report["winner"]["recipe"]["passes"][0]["bits"] == 8
    assert report["winner"]["job_id"] == study["winner_job_id"]
    assert report["winner"]["kept"]
    assert report["runner_up"]["gain"] > 0.1
    assert [gate["gate"] for gate in report["runner_up"]["misses"]] == ["centred_cosine >= 0.9"]
    jobs, _ = service.store.reader.page("default")
    assert {job.study_id for job in jobs} == {study["id"]}
    judged = service.store.reader.report(study["winner_job_id"])
    chosen = service.store.reader.report(
        next(job.id for job in jobs if job.verdict == "accepted" and job.id != study["winner_job_id"])
    )
    assert judged is not None
    assert chosen is not None
    assert [entry["part"] for entry in (judged["recipe"]["evaluate"][0], chosen["recipe"]["evaluate"][0])] == [
        "judge",
        "choose",
    ]
    # The same weights, measured on other texts.
    assert judged["artifacts"][0]["size_bytes"] == chosen["artifacts"][0]["size_bytes"]
    assert judged["artifacts"][0]["measurements"] != chosen["artifacts"][0]["measurements"]


def check_the_commands(study: dict[str, Any]) -> None:
    for command, says in (
        (["studies"], study["id"]),
        (["studies", "list"], "accepted"),
        (["studies", "show", study["id"]], "Winner: trial 1"),
        (["studies", "trials", study["id"]], "centred_cosine >= 0.9"),
        (["studies", "events", study["id"]], "trial_started"),
        (["studies", "events", study["id"], "--follow"], "succeeded"),
        (["studies", "watch", study["id"]], "On the other side of the gate"),
        (["studies", "cancel", study["id"]], "succeeded"),
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output)
        assert says in done.output, (command, done.output)
