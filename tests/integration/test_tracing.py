"""A job is one trace through the API, the ring, the worker and its child, as received by a real OTLP receiver."""

import gzip
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from sqlalchemy import update

from nightpress import migrations
from nightpress.core.database import transaction
from nightpress.core.ids import new_id
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.service.access.keys import create_key
from nightpress.core.service.tables.registry import models
from tests.patience import slowness
from tests.servers import Valkey, free_port
from tests.service import Service, eventually

RECIPE = {
    "name": "eights",
    "passes": [{"pass": "weight-only", "bits": 8}],
    "exports": ["compressed-tensors"],
    "evaluate": [{"metric": "fidelity", "samples": 2, "length": 16}],
}
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """An OTLP/HTTP receiver. `spans`: (service that sent it, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    about = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
                    found = [span for scope in resource.scope_spans for span in scope.spans]
                    collector.spans += [(about["service.name"], item) for item in found]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def service(tmp_path: Path, valkey_server: Valkey, collector: Collector) -> Iterator[Service]:
    valkey_server.flush()
    url = f"sqlite:///{tmp_path / 'nightpress.db'}"
    migrations.upgrade(url)
    service = Service(
        tmp_path, url, broker_url=valkey_server.url, otlp_endpoint=collector.url, lease_ttl_s=30.0, tick_s=2.0
    )
    yield service
    service.close()


@pytest.mark.slow
def test_a_jobs_trace_spans_all_processes_that_work_on_it(
    service: Service, collector: Collector, bert_tiny: Path
) -> None:
    service.model_id, service.model_digest = service.register(new_id("mdl"), bert_tiny)
    header = inspect_model(FolderFiles(bert_tiny)).model_dump(mode="json")
    with transaction(service.engine) as connection:
        connection.execute(update(models).where(models.c.id == service.model_id).values(header=header))
    key = create_key(service.engine, tenant_id="default", name="t", scopes=["jobs:read", "jobs:write"])[1]
    port = free_port()
    service.start("-m", "nightpress.api", NIGHTPRESS_API_PORT=str(port))
    service.start_worker(None)
    base = f"http://127.0.0.1:{port}"
    eventually(lambda: _answers(base), within=60)
    told = {"Authorization": f"Bearer {key}", "traceparent": CALLER}
    answer = httpx.post(
        f"{base}/v1/jobs", json={"model": service.model_id, "recipe": RECIPE}, headers=told, trust_env=False
    )
    assert answer.status_code == 201, answer.text
    job_id = answer.json()["id"]
    service.await_state(job_id, "succeeded", within=180)
    for process in service.processes:  # a process sends its last spans when it ends
        process.terminate()
        process.wait(30 * slowness())

    trace = bytes.fromhex(CALLER.split("-")[1])
    found = {(sender, span.name): span for sender, span in collector.spans if span.trace_id == trace}
    names = {sender: {name for item, name in found if item == sender} for sender, _ in found}
    assert names["nightpress-api"] == {"POST /v1/jobs", "submit", "ring"}
    assert names["nightpress-worker"] == {"hear", "claim", "attempt", "stage", "press", "upload", "commit"}
    phases = {"validating", "baseline", "pressing", "exporting", "verifying", "evaluating"}
    assert names["nightpress-child"] == phases | {"pass weight-only"}

    def parents(sender: str, name: str) -> list[str]:
        by_id = {span.span_id: (item, span.name) for (item, _), span in found.items()}
        above, at = [], found[sender, name].parent_span_id
        while at in by_id:
            above.append(by_id[at][1])
            at = found[by_id[at]].parent_span_id
        assert at == bytes.fromhex(CALLER.split("-")[2]), "the caller's own span is above all"
        return above

    assert parents("nightpress-worker", "hear") == ["ring", "POST /v1/jobs"]
    assert parents("nightpress-worker", "claim") == ["submit", "POST /v1/jobs"]
    assert parents("nightpress-child", "pass weight-only") == ["press", "attempt", "submit", "POST /v1/jobs"]
    assert parents("nightpress-worker", "commit") == ["attempt", "submit", "POST /v1/jobs"]
    press, step = found["nightpress-worker", "press"], found["nightpress-child", "pass weight-only"]
    assert press.start_time_unix_nano < step.start_time_unix_nano < step.end_time_unix_nano < press.end_time_unix_nano
    ended = {attribute.key: attribute.value for attribute in found["nightpress-worker", "attempt"].attributes}
    assert ended["nightpress.outcome"].string_value == "succeeded"
    assert ended["nightpress.job_id"].string_value == job_id


def _answers(base: str) -> bool:
    try:
        return httpx.get(f"{base}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_nothing_of_opentelemetry_is_loaded_where_no_endpoint_is_set() -> None:
    """The SDK and the exporters must not be loaded. The API package may be: redis imports it if it is installed."""
    script = (
        "import sys; from nightpress.core.tracing import configure_tracing, span, traceparent; import nightpress.api.app, nightpress.worker.app\n"
        "configure_tracing('', 'api')\n"
        "with span('x'): assert traceparent() is None\n"
        "sys.exit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
