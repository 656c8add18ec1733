"""A real API on a real port, in a thread of the test's process, so that a test can also act as its worker."""

import hashlib
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from nightpress.api.__main__ import Server
from nightpress.api.app import create_app
from nightpress.api.connections import configure
from nightpress.api.deps import Services
from nightpress.core.handoff.manifest import ArtifactEntry, FileEntry, Manifest
from nightpress.core.service.access.keys import ALL_SCOPES, create_key
from nightpress.core.service.jobs.records import Claimed, Succeeded, WorkerOffer
from nightpress.core.settings import Settings
from tests.deliveries import report_of
from tests.patience import slowness


@dataclass
class RunningApi:
    url: str
    services: Services

    def key(self, *, tenant_id: str = "default", scopes: Collection[str] = tuple(ALL_SCOPES - {"admin"})) -> str:
        return create_key(self.services.resources.engine, tenant_id=tenant_id, name="test", scopes=scopes)[1]

    def client(self, **kwargs: Any) -> httpx.Client:
        """A client with a new key. Use it as a context manager."""
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key(**kwargs)}"},
            timeout=20 * slowness(),
            trust_env=False,
        )

    def claim(self) -> Claimed:
        """Take the next job, as a worker would."""
        offer = WorkerOffer(worker_id="test-worker", queue="cpu", device="cpu", memory=1 << 40, threads=1)
        claimed = self.services.resources.store.claims.claim(offer, ttl_s=60)
        assert claimed is not None
        return claimed

    def ship(self, claimed: Claimed, files: Mapping[str, bytes], *, format: str = "onnx") -> Succeeded:  # noqa: A002
        """Store an attempt's files. The API shows none of them before `finish`."""
        prefix = f"jobs/{claimed.job.id}/attempts/{claimed.lease.attempt}"
        entries = []
        for path, data in files.items():
            self.services.resources.objects.put_bytes(f"{prefix}/{format}/{path}", data)
            entries.append(FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
        for name in ("report.json", "report.html", "report.md"):
            self.services.resources.objects.put_bytes(f"{prefix}/{name}", f"this is {name}".encode())
        manifest = Manifest(
            job_id=claimed.job.id,
            attempt=claimed.lease.attempt,
            verdict="accepted",
            artifacts=(ArtifactEntry(format=format, path=format, files=tuple(entries), consumer="onnxruntime 1.32.0"),),
            report=(),
        )
        report = report_of(claimed.job.id, manifest.artifacts).model_dump(mode="json")
        return Succeeded(verdict="accepted", manifest=manifest, report=report)


@contextmanager
def serve(settings: Settings, *, port: int = 0) -> Iterator[RunningApi]:
    app = create_app(settings)
    server = Server(configure(app, settings, port=port, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, name="api under test")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the API did not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield RunningApi(f"http://127.0.0.1:{port}", app.state.services)
    finally:
        server.should_exit = True
        thread.join(20 * slowness())
        assert not thread.is_alive(), "the API did not stop"
