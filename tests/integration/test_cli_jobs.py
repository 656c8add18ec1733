"""The `nightpress` command as a user runs it: real processes, a real API, the output streams and the exit statuses."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from nightpress.client.cli.doctor import examine
from nightpress.client.cli.session import Session
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Progress
from nightpress.core.handoff.manifest import describe_folder
from nightpress.core.wire.jobs import JobView
from nightpress.worker.offer import introduce
from tests.command import run
from tests.face import OFFER, RECIPE, Face, pulled_files
from tests.jobs import age, host
from tests.patience import slowness
from tests.service import eventually

COMMAND = [sys.executable, "-m", "nightpress.client.cli.main"]


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    face = Face(tmp_path_factory.mktemp("face"))
    face.start()
    yield face
    face.close()


@pytest.fixture(scope="module")
def model_id(face: Face, bert_tiny: Path) -> str:
    with face.client() as client:
        return client.models.upload(bert_tiny).id


@pytest.fixture
def job(face: Face, model_id: str) -> Iterator[JobView]:
    with face.client() as client:
        job = client.jobs.submit(model_id, RECIPE)
        yield job
        client.jobs.cancel(job.id)


@pytest.mark.slow
def test_a_folder_is_submitted_and_json_stands_alone(face: Face, bert_tiny: Path, tmp_path: Path):
    (tmp_path / "own.json").write_text(json.dumps(RECIPE))
    done = run(
        face, "submit", str(bert_tiny), "-r", str(tmp_path / "own.json"), "-l", "suite=cli", "--priority", "7", "--json"
    )
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert (job["state"], job["priority"], job["labels"], job["model_name"]) == (
        "queued",
        7,
        {"suite": "cli"},
        "bert-tiny",
    )
    listed = run(face, "ls", "--label", "suite=cli", "--json")
    assert [json.loads(line)["id"] for line in listed.stdout.splitlines()] == [job["id"]]
    cancelled = run(face, "cancel", job["id"])
    assert (cancelled.returncode, cancelled.stdout) == (0, f"{job['id']} is cancelled.\n")
    again = run(face, "retry", job["id"])
    assert again.returncode == 0
    with face.client() as client:
        assert client.jobs.get(again.stdout.strip()).retry_of == job["id"]
        client.jobs.cancel(again.stdout.strip())


@pytest.mark.parametrize(
    ("ending", "status"), [("accepted", 0), ("rejected", 3), ("failed", 1), ("cancelled", 1)], ids=str
)
def test_a_jobs_end_is_an_exit_status(face: Face, job: JobView, ending: str, status: int):
    if ending == "cancelled":
        face.store.requests.request_cancel("default", job.id)
    else:
        claimed = face.claim()
        if ending == "failed":
            face.fail(
                claimed, NightpressError(ErrorCode.NUMERICAL_FAILURE, "The scales are not finite.", hint="Use bits: 8.")
            )
        else:
            face.succeed(claimed, verdict=ending)
    for subcommand in ("wait", "watch"):
        done = run(face, subcommand, job.id)
        assert done.returncode == status, done.stderr
        assert ending in done.stdout or ending == "accepted"
        if ending == "failed":
            assert "numerical_failure: The scales are not finite." in done.stderr
            assert "Use bits: 8." in done.stderr
    waited = run(face, "wait", job.id, "--json")
    assert (waited.returncode, json.loads(waited.stdout)["id"]) == (status, job.id)


@pytest.mark.slow
def test_submit_with_wait_goes_to_the_end(face: Face, model_id: str):
    process = subprocess.Popen(
        [*COMMAND, "submit", model_id, "-r", "int8-weights", "--wait"],
        env=face.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    face.succeed(eventually(lambda: face.store.claims.claim(OFFER, ttl_s=60)))
    out, err = process.communicate(timeout=30 * slowness())
    assert process.returncode == 0, err
    assert "succeeded" in out
    assert "\x1b" not in out + err, "a pipe is no terminal"


@pytest.mark.parametrize("arguments", [("wait",), ("watch",), ("watch", "--json"), ("logs", "-f")], ids=" ".join)
@pytest.mark.slow
def test_ctrl_c_detaches_and_never_cancels(face: Face, job: JobView, arguments: tuple[str, ...]):
    process = subprocess.Popen(
        [*COMMAND, arguments[0], job.id, *arguments[1:]],
        env=face.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _await_request(face, job.id, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20 * slowness())
    assert process.returncode == 130
    assert f"nightpress cancel {job.id}" in err
    assert "Traceback" not in err
    with face.client() as client:
        assert client.jobs.get(job.id).state == "queued"


def _await_request(face: Face, job_id: str, process: "subprocess.Popen[str]") -> None:
    """Wait until the command has a connection to the API: from then on it waits for the job."""
    connected = f":{face.settings.api_port:04X} 01"

    def talking() -> bool:
        assert process.poll() is None
        table = Path(f"/proc/{process.pid}/net/tcp").read_text()
        inodes = {line.split()[9] for line in table.splitlines() if connected in line}
        links = [_link(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
        return any(f"socket:[{inode}]" in links for inode in inodes)

    eventually(talking)
    time.sleep(0.3)


def _link(handle: Path) -> str:
    try:
        return handle.readlink().name
    except FileNotFoundError:
        return ""  # closed since it was listed


@pytest.mark.slow
def test_watch_shows_progress_on_a_terminal(face: Face, job: JobView):
    claimed = face.claim()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "watch", job.id], env=face.environment() | {"TERM": "xterm"}, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    face.store.attempts.renew(
        claimed.lease, ttl_s=60, progress=Progress(phase="pressing", fraction=0.42, message="layer 3")
    )
    seen = _read_until(ours, b"42%")
    assert b"pressing" in seen
    face.succeed(claimed)
    _read_until(ours, b"succeeded")
    assert process.wait(20 * slowness()) == 0
    os.close(ours)


def _read_until(terminal: int, wanted: bytes, within: float = 20.0) -> bytes:
    seen, began = b"", time.monotonic()
    while wanted not in seen:
        assert time.monotonic() - began < within * slowness(), seen
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 65536)
    return seen


def test_watch_as_json_is_the_jobs_events(face: Face, job: JobView):
    face.succeed(face.claim())
    done = run(face, "watch", job.id, "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert (done.returncode, events[-1]["kind"]) == (0, "succeeded")


@pytest.mark.slow
def test_nothing_from_a_server_steers_the_terminal(face: Face, job: JobView):
    claimed = face.claim()
    evil = "start \x1b]0;owned\x07 \x1b[2J \u202eend\r\x9b31m"
    face.store.attempts.append_logs(claimed.lease, [("info", evil)])
    face.succeed(claimed)
    for arguments in (("logs", job.id), ("report", job.id), ("logs", job.id, "--json"), ("inspect", job.id)):
        done = run(face, *arguments)
        assert done.returncode == 0, done.stderr
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(done.stdout), arguments
    assert "start" in run(face, "logs", job.id).stdout


@pytest.mark.slow
def test_inspect_shows_a_history_however_long_it_is(face: Face, job: JobView):
    claimed = face.claim()
    for step in range(1010):
        face.store.attempts.record_event(claimed.lease, "checkpoint", {"step": step})
    seen = json.loads(run(face, "inspect", job.id, "--json").stdout)["events"]
    assert [event["seq"] for event in seen] == list(range(1, 1013))
    assert "step=1009" in run(face, "inspect", job.id).stdout
    face.succeed(claimed)


def test_a_result_is_pulled_and_compared(face: Face, job: JobView, tmp_path: Path):
    made = face.succeed(face.claim(), verdict="rejected")
    done = run(face, "pull", job.id, "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rejected" in done.stderr
    pulled = describe_folder(tmp_path / "here" / "compressed-tensors")
    assert pulled == describe_folder(made / "compressed-tensors"), "nothing signed, since it was rejected"
    assert (tmp_path / "here" / "report.html").read_text().startswith("<!doctype html>")
    report = run(face, "report", job.id, "--html", str(tmp_path / "r.html"))
    assert report.returncode == 0, report.stderr
    for figure in (
        "90.9 MB",
        "23.0 MB (25%)",
        "0.9936 [0.9930, 0.9941]",
        "40.0 ms (2.0× SLOWER)",
        "300.0 MB",
        "MISSED",
    ):
        assert figure in report.stdout, report.stdout
    assert (tmp_path / "r.html").exists()
    assert json.loads(run(face, "report", job.id, "--json").stdout)["verdict"] == "rejected"


def test_a_models_name_pulls_its_newest_accepted_result(face: Face, bert_tiny: Path, tmp_path: Path):
    with face.client() as client:  # a new name: other tests have accepted jobs too
        job = client.jobs.submit(client.models.upload(bert_tiny, "followed").id, RECIPE)
    none_yet = run(face, "pull", job.model_name, cwd=tmp_path)
    assert none_yet.returncode == 5, none_yet.stderr
    made = face.succeed(face.claim(), verdict="accepted")
    done = run(face, "pull", job.model_name, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job"] == job.id
    folder = tmp_path / job.model_name / "compressed-tensors"
    assert pulled_files(folder) == describe_folder(made / "compressed-tensors")


def test_damage_is_a_fault_of_its_own_status(face: Face, job: JobView, tmp_path: Path):
    face.succeed(face.claim())
    face.objects.put_bytes(f"jobs/{job.id}/attempts/1/compressed-tensors/config.json", b"[]")
    done = run(face, "pull", job.id, "--out", str(tmp_path))
    assert done.returncode == 6
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "compressed-tensors" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("inspect", "job_00000000000000000000000000"), 5, "There is no such job"),
        (("submit", "no-such-model", "-r", "int8-encoder"), 5, "no-such-model"),
        (("submit", "./no-such-folder", "-r", "int8-encoder"), 2, "no folder"),
        (("submit", "bert-tiny", "-r", "no-such.yaml"), 2, "no file"),
        (("submit", "bert-tiny", "-r", "no-such-recipe"), 5, "int8-encoder"),
        (("submit", "bert-tiny"), 2, "--recipe"),
        (("ls", "--label", "x"), 2, "key=value"),
        (("ls", "--state", "asleep"), 4, "state"),
        (("--api", "http://127.0.0.1:1", "ls"), 2, "--api"),
        (("ls", "--api", "http://127.0.0.1:1"), 4, "nightpress up"),
        (("nonsense",), 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_are_told_kindly(face: Face, arguments: tuple[str, ...], status: int, said: str):
    done = run(face, *arguments)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_recipes_faults_are_all_named_with_their_places(face: Face, tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("name: Bad\npasses: [{pass: gold}]\nexports: [onnx]\ngates: {size: small}\n")
    done = run(face, "recipes", "validate", str(tmp_path / "bad.yaml"))
    assert done.returncode == 4
    assert "passes.0" in done.stderr
    assert "name" in done.stderr
    good = run(face, "recipes", "validate", "int8-encoder", "--model", "bert-tiny")
    assert good.returncode == 0, good.stderr
    assert "memory" in good.stdout


def test_a_hostile_model_is_refused_here_already(face: Face, tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    done = run(face, "submit", str(tmp_path), "-r", "int8-encoder")
    assert done.returncode == 4
    assert "pickle" in done.stderr
    assert "nightpress convert" in done.stderr


@pytest.mark.slow
def test_doctor_names_what_is_wrong_and_how_to_mend_it(face: Face, tmp_path: Path):
    done = run(face, "doctor", "--json")
    checks = {check["name"]: check for check in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1
    assert checks["API"]["status"] == checks["database"]["status"] == checks["storage"]["status"] == "ok"
    assert checks["key"]["status"] == "ok"
    assert checks["broker"]["status"] == "failed"
    assert "NIGHTPRESS_BROKER_URL" in checks["broker"]["mend"]
    assert checks["workers"]["status"] == "failed"


def test_doctor_tells_a_wrong_key_and_looks_itself_where_no_api_answers(face: Face, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NIGHTPRESS_API_KEY", "np_nonsense")
    checks = {check.name: check for check in islice(examine(Session(face.url), face.settings), 6)}
    assert checks["key"].status == "failed"
    assert "NIGHTPRESS_API_KEY" in checks["key"].found
    checks = {check.name: check for check in islice(examine(Session("http://127.0.0.1:1"), face.settings), 5)}
    assert [checks[name].status for name in ("API", "database", "broker", "storage")] == [
        "failed",
        "ok",
        "failed",
        "ok",
    ]


def test_doctor_sees_jobs_that_no_worker_will_take(face: Face, model_id: str):
    with face.client() as client:
        job = client.jobs.submit(model_id, RECIPE)
        checks = {check.name: check for check in islice(examine(Session(face.url), face.settings), 8)}
        client.jobs.cancel(job.id)
    assert checks["workers"].status == "failed"
    assert "waiting in the queue cpu, which no worker serves" in checks["workers"].found
    assert "NIGHTPRESS_WORKER_QUEUE=cpu python -m nightpress.worker" in checks["workers"].mend


def test_help_documents_the_exit_statuses(face: Face):
    done = run(face, "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for status in ("0 success", "3 the result missed a gate", "130 Ctrl-C"):
        assert status in text


def test_the_web_pages_address_carries_the_key_behind_the_hash(face: Face):
    address = run(face, "web", "--print").stdout.strip()
    assert address == f"{face.url}/#key={face.key}"


@pytest.mark.slow
def test_a_job_that_no_worker_will_take_is_listed_and_waited_for_with_a_notice(face: Face, job: JobView):
    age(face.engine, job.id, 3700, "created_at", "run_after")
    listed = run(face, "ls")
    assert f"queued (no {job.queue} worker)" in listed.stdout
    waited = run(face, "wait", job.id, "--timeout", "0.1")
    assert (
        f"No {job.queue} worker has been seen lately. Start one with NIGHTPRESS_WORKER_QUEUE={job.queue}"
        in waited.stderr
    )
    inspected = run(face, "inspect", job.id)
    assert job.queue_reason in inspected.stdout
    face.store.requests.request_cancel("default", job.id)


@pytest.mark.slow
def test_workers_queues_and_plans_show_gpus(face: Face, model_id: str, tmp_path: Path):
    offer = host("host-of-four", 4, cpu_jobs=2)
    face.store.roster.heartbeat_worker(introduce(offer, draining=False))
    recipe = {"name": "wide", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"], "gpus": 3}
    (tmp_path / "wide.json").write_text(json.dumps(recipe))
    with face.client() as client:
        jobs = [client.jobs.submit(model_id, recipe) for _ in range(2)]
        assert face.store.claims.claim(offer, ttl_s=600) is not None
        lines = run(face, "workers").stdout.splitlines()
        shown = next(line for line in lines if "host-of-four" in line)
        assert "gpu + 2 cpu" in shown
        assert "1 of 4 free, 80.0 GB" in shown
        assert jobs[0].id in shown
        told = next(worker for worker in json.loads(run(face, "workers", "--json").stdout) if worker["gpus"])
        assert [gpu["job_id"] for gpu in told["gpus"]] == [jobs[0].id] * 3 + [None]
        assert "3 needed, 3 held" in run(face, "queues").stdout
        plan = run(face, "recipes", "validate", str(tmp_path / "wide.json"), "-m", model_id).stdout
        assert "It holds 3 GPUs: `gpus: 3`, as the recipe says." in plan
        assert "with 3 GPUs" in plan
        for job in jobs:
            client.jobs.cancel(job.id)
    face.store.roster.remove_worker("host-of-four")
