"""F26: during a deploy, two versions use one database.

The code from before the newest migration runs on the new tables. The new code waits for the new tables.
"""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nightpress import migrations
from tests.api_process import ApiProcess
from tests.servers import Valkey
from tests.service import RECIPE, ROOT, Service, eventually, module_of


def code_before_the_newest_migration() -> bytes | None:
    """An archive of the commit before the one that added the newest migration, from the project's git history."""
    newest = next((ROOT / "migrations" / "versions").glob(f"{migrations.newest()}_*.py")).relative_to(ROOT)
    git = ["git", "-C", str(ROOT)]
    brought = subprocess.run(
        [*git, "log", "--format=%H", "--follow", "--diff-filter=A", "-1", "--", str(newest)],
        capture_output=True,
        text=True,
        check=False,
    )
    if brought.returncode or not brought.stdout.strip():
        return None
    archive = [*git, "archive", f"{brought.stdout.strip()}^"]
    made = subprocess.run(archive, capture_output=True, check=False)
    return made.stdout if made.returncode == 0 else None


@pytest.fixture(scope="module")
def old_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = code_before_the_newest_migration()
    if archive is None:
        pytest.skip("this copy of the project has no history")
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def old_revision(old_tree: Path) -> str:
    return max(path.name.partition("_")[0] for path in (old_tree / "migrations" / "versions").glob("[0-9]*.py"))


def test_f26_an_old_worker_and_an_old_control_process_serve_a_new_database(service: Service, old_tree: Path) -> None:
    assert old_revision(old_tree) < migrations.newest()
    old = {"PYTHONPATH": str(old_tree)}
    service.start(str(old_tree / "tests" / "worker_process.py"), "first_slow", cwd=old_tree, **old)
    service.start("-m", module_of(old_tree, "worker.control"), cwd=old_tree, **old)
    job_id = service.submit()
    old_worker = service.await_state(job_id, "running", within=30).worker_id
    # The old worker is killed. The old control process expires the lease, and a new worker completes the job.
    first = service.processes[0]
    first.kill()
    service.start_worker("first_slow")
    job = service.await_state(job_id, "succeeded", within=30)
    assert (job.attempt, job.failures) == (2, 1)
    assert job.worker_id != old_worker
    service.check_invariants(job_id)


def test_f26_a_new_worker_waits_for_its_tables_and_does_what_old_code_submits(
    tmp_path: Path, valkey_server: Valkey, old_tree: Path
) -> None:
    valkey_server.flush()
    url = f"sqlite:///{tmp_path / 'nightpress.db'}"
    migrations.upgrade(url, "0001")  # a worker of any later version can't work with these tables
    service = Service(tmp_path, url, broker_url=valkey_server.url)
    try:
        service.start("tests/worker_process.py", "press")
        service.start_control()
        eventually(lambda: "no such column" in service.output() or "no such table" in service.output(), within=30)
        migrations.upgrade(url)
        service.await_state(submitted_by(old_tree, service), "succeeded", within=60)
    finally:
        service.close()


def test_f26_an_old_worker_does_what_a_new_api_accepts(service: Service, old_tree: Path, bert_tiny: Path) -> None:
    old = {"PYTHONPATH": str(old_tree)}
    service.start(str(old_tree / "tests" / "worker_process.py"), "press", cwd=old_tree, **old)
    take_a_job_through(ApiProcess(service, bert_tiny), ROOT, service)


def test_f26_a_new_worker_does_what_an_old_api_accepts(service: Service, old_tree: Path, bert_tiny: Path) -> None:
    service.start_worker("press")
    take_a_job_through(ApiProcess(service, bert_tiny), old_tree, service)


def take_a_job_through(api: ApiProcess, tree: Path, service: Service) -> None:
    """Submit a job and read its result over HTTP only, as a client that knows nothing of the deploy."""
    api.start(tree=tree)
    with api.client() as client:
        answer = client.post("/v1/jobs", json=api.job | {"recipe": RECIPE})
        assert answer.status_code == 201, answer.text
        job_id = answer.json()["id"]
        eventually(lambda: client.get(f"/v1/jobs/{job_id}").json()["state"] == "succeeded", within=60)
        assert client.get(f"/v1/jobs/{job_id}/artifacts").status_code == 200
        assert client.get(f"/v1/jobs/{job_id}/report").status_code == 200
    service.check_invariants(job_id)


def submitted_by(tree: Path, service: Service) -> str:
    """Submit a job with the code of `tree`. Returns its id."""
    script = (
        "import sys; from tests.service import JobStore, Service, make_engine; "
        "s = object.__new__(Service); s.store = JobStore(make_engine(sys.argv[1])); "
        "s.model_id, s.model_digest = sys.argv[2:]; print(s.submit())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, service.settings.sql_url, service.model_id, service.model_digest],
        cwd=tree,
        env=service.environment() | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
