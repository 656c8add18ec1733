"""Accepted jobs with files, reports and a courier that the test drives, for the tests of signatures and deliveries."""

import ipaddress
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from nightpress.core.compress.report import render_html, render_markdown
from nightpress.core.database import make_engine
from nightpress.core.handoff.manifest import ArtifactEntry, Manifest, describe_bytes, digest_of
from nightpress.core.handoff.report import Report
from nightpress.core.service.compose import Resources
from nightpress.core.service.deliveries.courier import DeliveryCourier
from nightpress.core.service.jobs.records import Succeeded
from nightpress.core.settings import Settings
from nightpress.core.wire.deliveries import CredentialCreate, CredentialView, ResultDeliveryView, Secrets
from tests.jobs import add_model, claim, submit
from tests.reports import full_report
from tests.service import eventually

TENANT = "default"
LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")
FILES = {"model.onnx": b"weights" * 1000, "config.json": b'{"model_type": "bert"}', "sub/vocab.txt": b"a\nb\n"}


class World:
    """One installation in a folder. Its control process is the test, which calls `run`."""

    def __init__(self, folder: Path, sql_url: str, **settings: Any) -> None:
        given = {"destination_networks": [LOOPBACK], "s3_endpoint_url": None} | settings
        self.settings = Settings(_env_file=None, data_dir=folder, database_url=sql_url, **given)
        self.engine = make_engine(sql_url)
        add_model(self.engine)
        self.resources = Resources(self.settings, self.engine)
        self.store = self.resources.deliveries
        self.courier = self.new_courier()

    def new_courier(self, **more: Any) -> DeliveryCourier:
        """The courier of one more replica of the control process."""
        found = self.resources
        return DeliveryCourier(
            found.deliveries, found.credentials, found.signing, self.engine, found.objects, self.settings, **more
        )

    def close(self) -> None:
        self.courier.close()
        self.engine.dispose()

    def accept(
        self,
        artifacts: Mapping[str, Mapping[str, bytes]] | None = None,
        *,
        verdict: str = "accepted",
        destinations: Sequence[str] = (),
        **fields: Any,
    ) -> str:
        """Run a job to its end, as a worker would: files and reports in storage, then its transaction. Returns the job's id."""
        store = self.resources.store
        job_id = submit(store, destinations=list(destinations), **fields)
        lease = claim(store).lease
        assert lease.job_id == job_id
        prefix = f"jobs/{job_id}/attempts/{lease.attempt}"
        entries = []
        for form, files in (artifacts or {"onnx": FILES}).items():
            for path, data in files.items():
                self.resources.objects.put_bytes(f"{prefix}/{form}/{path}", data)
            described = tuple(describe_bytes(path, data) for path, data in sorted(files.items()))
            entries.append(ArtifactEntry(format=form, path=form, files=described, consumer="onnxruntime 1.32.0"))
        report = report_of(job_id, entries, verdict)
        reports = []
        for name, text in drawn(report).items():
            self.resources.objects.put_bytes(f"{prefix}/{name}", text)
            reports.append(describe_bytes(name, text))
        manifest = Manifest(
            job_id=job_id, attempt=lease.attempt, verdict=verdict, artifacts=tuple(entries), report=tuple(reports)
        )
        outcome = Succeeded(verdict=verdict, manifest=manifest, report=report.model_dump(mode="json"))
        assert store.attempts.finish(lease, outcome)
        return job_id

    def credentials(self, prefix: str, tenant_id: str = TENANT, **secrets: str) -> CredentialView:
        given = Secrets(**{name: SecretStr(value) for name, value in secrets.items()})
        return self.resources.credentials.create(tenant_id, CredentialCreate(prefix=prefix, secrets=given))

    def deliveries(self, **filters: Any) -> list[ResultDeliveryView]:
        return self.store.page(TENANT, cursor=None, limit=200, **filters)[0]

    def run(self, courier: DeliveryCourier | None = None) -> ResultDeliveryView:
        """Let a courier work until no attempt is under way. Returns the newest delivery with its log."""
        mine = courier or self.courier
        mine.advance()
        eventually(lambda: not mine.running)
        return self.store.get(TENANT, self.deliveries()[0].id)


def report_of(job_id: str, entries: Sequence[ArtifactEntry], verdict: str = "accepted") -> Report:
    """A full report on these artifacts."""
    tree = full_report(job=job_id, verdict=verdict).model_dump(mode="json")
    subject = tree["artifacts"][0]
    tree["artifacts"] = [
        {
            **subject,
            "name": entry.path,
            "format": entry.format,
            "digest": digest_of(entry.files),
            "size_bytes": entry.size,
        }
        for entry in entries
    ]
    tree["gates"] = []
    return Report.model_validate(tree)


def drawn(report: Report) -> dict[str, bytes]:
    """The files of a report."""
    return {
        "report.json": json.dumps(report.model_dump(mode="json")).encode(),
        "report.html": render_html(report).encode(),
        "report.md": render_markdown(report).encode(),
    }


def large_files(size: int) -> dict[str, bytes]:
    """An artifact of one large file, whose blocks all differ, and a small one."""
    blocks = (index.to_bytes(8, "big") * 8192 for index in range(-(-size // 65536)))
    return {"model.onnx": b"".join(blocks)[:size], "config.json": b"{}"}
