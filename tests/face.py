"""A real API process with its own database, for tests of the client. The test acts as the worker, through the store."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx

from nightpress.client import Client
from nightpress.core.artifacts.open import open_store
from nightpress.core.database import make_engine
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.manifest import ATTESTATION_FILE, ArtifactEntry, FileEntry, Manifest, describe_folder
from nightpress.core.handoff.report import GateResult, Measurement, Report, Subject, Timing, Verification
from nightpress.core.service.access.keys import ALL_SCOPES, create_key
from nightpress.core.service.jobs.records import Claimed, Succeeded, WorkerOffer
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.settings import Settings
from tests import forked_process
from tests.databases import migrated_sqlite
from tests.forked_process import Process
from tests.servers import free_port
from tests.service import ROOT, eventually

OFFER = WorkerOffer("wkr_test", "cpu", "cpu", 64 * 1024**3, 2)
RECIPE = {
    "name": "eights",
    "passes": [{"pass": "weight-only", "bits": 8}],
    "exports": ["compressed-tensors"],
    "gates": {"size": "<= 80%"},
}


class Face:
    """One API process. Its broker's address leads nowhere on purpose: no worker needs to be woken here."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = Settings(
            _env_file=None,
            data_dir=folder / "np",
            api_port=free_port(),
            broker_url="redis://127.0.0.1:1/0",
            **settings,
        )
        self.settings.data_dir.mkdir(mode=0o700, parents=True)
        migrated_sqlite(self.settings.data_dir / "nightpress.db")
        self.engine = make_engine(self.settings.sql_url)
        self.store = JobStore(self.engine)
        self.objects = open_store(self.settings)
        _, self.key = create_key(self.engine, name="test", scopes=ALL_SCOPES)
        self.settings.key_file.write_text(self.key)
        self.url = f"http://127.0.0.1:{self.settings.api_port}"
        self._process: Process | None = None

    def start(self) -> None:
        with (self.folder / "api.log").open("ab") as log:
            command = ("-m", "nightpress.api")
            self._process = forked_process.start(command, environment=self.environment(), cwd=ROOT, log=log)
        eventually(self._alive, within=30)

    def _alive(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "api.log").read_text()
        try:
            return httpx.get(f"{self.url}/healthz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        self.stop()
        self.engine.dispose()

    def environment(self) -> dict[str, str]:
        """The environment for a process of this installation: the API, or a user's command."""
        told = self.settings.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        secrets = ("s3_access_key_id", "s3_secret_access_key")
        told |= {name: value.get_secret_value() for name in secrets if (value := getattr(self.settings, name))}
        env = {
            f"NIGHTPRESS_{name.upper()}": json.dumps(value) if isinstance(value, list | dict) else str(value)
            for name, value in told.items()
        }
        clean = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTPRESS_")}
        own = {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "XDG_CONFIG_HOME": str(self.folder / "config")}
        return {**clean, **env, **own}

    def client(self, url: str | None = None, **more: Any) -> Client:
        return Client(url or self.url, self.key, **more)

    # A worker's part -------------------------------------------------------------------------------------------------

    def claim(self) -> Claimed:
        claimed = self.store.claims.claim(OFFER, ttl_s=60)
        assert claimed is not None
        return claimed

    def succeed(self, claimed: Claimed, *, verdict: Any = "accepted", size: int = 300_000) -> Path:
        """Store an artifact of two files and a report, and finish the job. Returns the local folder with the same files."""
        out = self.folder / f"out-{claimed.job.id}"
        weights = out / "compressed-tensors" / "sub dir" / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(os.urandom(size))
        (out / "compressed-tensors" / "config.json").write_text("{}")
        report = make_report(claimed.job.id, verdict)
        (out / "report.json").write_text(report.model_dump_json())
        (out / "report.md").write_text("# report")
        (out / "report.html").write_text("<!doctype html><title>report</title>")
        entry = ArtifactEntry(
            format="compressed-tensors",
            path="compressed-tensors",
            files=describe_folder(out / "compressed-tensors"),
            consumer="transformers 5.23.0",
        )
        prefix = f"jobs/{claimed.job.id}/attempts/{claimed.lease.attempt}"
        for path in sorted(out.rglob("*")):
            if path.is_file():
                self.objects.put_file(f"{prefix}/{path.relative_to(out).as_posix()}", path)
        manifest = Manifest(
            job_id=claimed.job.id,
            attempt=claimed.lease.attempt,
            verdict=verdict,
            artifacts=(entry,),
            report=tuple(file for file in describe_folder(out) if "/" not in file.path),
        )
        assert self.store.attempts.finish(claimed.lease, Succeeded(verdict, manifest, report.model_dump(mode="json")))
        return out

    def fail(self, claimed: Claimed, error: NightpressError) -> None:
        assert self.store.attempts.fail(claimed.lease, error, backoff_s=0.1) == "failed"


def pulled_files(folder: Path) -> tuple[FileEntry, ...]:
    """The files of a pulled artifact, without the signed statement that was fetched with them."""
    assert (folder / ATTESTATION_FILE).is_file()
    return tuple(file for file in describe_folder(folder) if file.path != ATTESTATION_FILE)


def make_report(job_id: str, verdict: Any) -> Report:
    def timing(milliseconds: float) -> Timing:
        return Timing(
            batch=1,
            length=128,
            threads=2,
            repeats=20,
            p50_ms=milliseconds,
            p95_ms=milliseconds * 1.2,
            throughput=1000 / milliseconds,
            throughput_unit="sequences/s",
        )

    cosine = Measurement(
        name="cosine", value=0.9936, low=0.993, high=0.9941, n=64, better="higher", data="builtin:prose"
    )
    verification = Verification(
        consumer="transformers 5.23.0",
        passed=True,
        measure="cosine of pooled outputs",
        value=0.9936,
        bound=0.9,
        seconds=3.0,
        load_snippet="AutoModel.from_pretrained(folder)",
    )
    pressed = Subject(
        name="compressed-tensors",
        format="compressed-tensors",
        size_bytes=23_000_000,
        measurements=(cosine,),
        timings=(timing(40.0),),
        peak_memory_bytes=300_000_000,
        verification=verification,
        notes=("slower than the source",),
    )
    gate = GateResult(
        gate="size <= 80%",
        artifact="compressed-tensors",
        observed=0.25,
        passed=verdict == "accepted",
        explanation="by the file sizes",
    )
    return Report(
        job_id=job_id,
        model={"name": "bert-tiny\x1b[31m", "digest": "sha256:0"},
        recipe={"name": "eights"},
        data=(),
        environment={},
        source=Subject(
            name="source",
            format="safetensors",
            size_bytes=90_900_000,
            timings=(timing(20.0),),
            peak_memory_bytes=400_000_000,
        ),
        artifacts=(pressed,),
        passes=(),
        gates=(gate,),
        verdict=verdict,
        phases={},
    )
