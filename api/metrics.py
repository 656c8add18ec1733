"""/metrics, for Prometheus. The requests of this process are counted here; the queue's figures are read from SQL."""

import math
import threading
import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from nightpress.core.service.costs.ledger import Spent
from nightpress.core.service.costs.prices import MICROS
from nightpress.core.service.jobs.queries import QUEUES
from nightpress.core.service.jobs.records import JobStatistics, Worker
from nightpress.core.service.jobs.roster import Fleet
from nightpress.core.service.jobs.states import ALL_STATES, CANCELLING, QUEUED, RUNNING

_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_FIGURES_KEPT_S = 5.0
QueueFigures = tuple[JobStatistics, list[Worker], Fleet, Spent | None]
_WORKER_STATES = ("idle", "busy", "draining", "unfit", "lost")


class ApiMetrics:
    """Latency and status of each route of this process, and the last figures of the queue."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._latency = Histogram(
            "nightpress_http_request_seconds",
            "Time from a request's first byte to its answer's last.",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._answers = Counter(
            "nightpress_http_requests", "Answers by status.", ("method", "route", "status"), registry=self.registry
        )
        self.streams = Gauge("nightpress_event_streams", "Open event and log streams.", registry=self.registry)
        self._lock = threading.Lock()
        self._figures: QueueFigures | None = None
        self._figures_until = 0.0
        self._series: dict[tuple[str, str, int], tuple[Histogram, Counter]] = {}

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request under the template of its route. Under its address, each id would make a new series."""
        route = getattr(scope.get("route"), "path", "(none)")
        method = scope["method"] if scope["method"] in _METHODS else "(other)"
        series = self._series.get((method, route, status))
        if series is None:
            series = (self._latency.labels(method, route), self._answers.labels(method, route, str(status)))
            self._series[method, route, status] = series
        latency, answers = series
        answers.inc()
        if "nightpress.stream" not in scope:  # a stream lasts until its reader leaves: that is no latency
            latency.observe(seconds)

    def queue(self, ask: Callable[[], QueueFigures]) -> QueueFigures:
        """The figures of the queue, at most 5 s old. They are cached because counting a million jobs takes most of a second."""
        with self._lock:
            if self._figures is None or time.monotonic() > self._figures_until:
                self._figures = ask()
                self._figures_until = time.monotonic() + _FIGURES_KEPT_S
            return self._figures

    def render(self, statistics: JobStatistics, workers: list[Worker], fleet: Fleet, spent: Spent | None) -> bytes:
        """The text that Prometheus scrapes."""
        queue = CollectorRegistry()
        queue.register(_QueueFigures(statistics, workers, fleet, spent))
        return generate_latest(self.registry) + generate_latest(queue)


class _QueueFigures(Collector):
    """The figures of the queue at a scrape. Every state has a series, even at zero, so that alerts need no `absent()`."""

    def __init__(
        self, statistics: JobStatistics, workers: list[Worker], fleet: Fleet, spent: Spent | None = None
    ) -> None:
        self._statistics = statistics
        self._workers = workers
        self._fleet = fleet
        self._spent = spent

    def collect(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily("nightpress_jobs", "Jobs by queue and state.", labels=("queue", "state"))
        depth = GaugeMetricFamily("nightpress_queue_depth", "Jobs that wait.", labels=("queue",))
        age = GaugeMetricFamily(
            "nightpress_queue_oldest_seconds", "Age of the oldest job that could run now.", labels=("queue",)
        )
        unserved = GaugeMetricFamily(
            "nightpress_queue_unserved_seconds",
            "Time since a worker of this queue was last seen; infinite where none has been for a week.",
            labels=("queue",),
        )
        for queue in QUEUES:
            silent = self._fleet.unserved_s(queue)
            unserved.add_metric((queue,), math.inf if silent is None else silent)
            for state in ALL_STATES:
                jobs.add_metric((queue, state), self._statistics.jobs.get((queue, state), 0))
            depth.add_metric((queue,), self._statistics.jobs.get((queue, "queued"), 0))
            age.add_metric((queue,), self._statistics.oldest_queued_s.get(queue, 0.0))
        gpus = GaugeMetricFamily(
            "nightpress_gpus", "GPUs that jobs need or hold, by the state of the jobs.", labels=("state",)
        )
        for state in (QUEUED, RUNNING, CANCELLING):
            gpus.add_metric((state,), self._statistics.gpus.get(state, 0))
        offered = GaugeMetricFamily("nightpress_worker_gpus", "GPUs that live workers offer.", labels=("state",))
        there = [gpu for worker in self._workers if worker.state != "lost" for gpu in worker.gpus or ()]
        offered.add_metric(("busy",), sum(gpu["job_id"] is not None for gpu in there))
        offered.add_metric(("free",), sum(gpu["job_id"] is None for gpu in there))
        failures = CounterMetricFamily("nightpress_job_failures", "Failed jobs by error code.", labels=("code",))
        for code, count in sorted(self._statistics.failures.items()):
            failures.add_metric((code,), count)
        workers = GaugeMetricFamily("nightpress_workers", "Workers by queue and state.", labels=("queue", "state"))
        for queue in QUEUES:
            for worker_state in _WORKER_STATES:
                count = sum(worker.queue == queue and worker.state == worker_state for worker in self._workers)
                workers.add_metric((queue, worker_state), count)
        spent = GaugeMetricFamily(
            "nightpress_spent", "What all tenants have spent, by the operator's prices.", labels=("period",)
        )
        for period, micros in () if self._spent is None else self._spent._asdict().items():
            spent.add_metric((period,), micros / MICROS)
        return (jobs, gpus, depth, age, unserved, failures, workers, offered, spent)
