"""The metrics of a worker or control process. Prometheus reads them at NIGHTPRESS_METRICS_PORT."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

_PHASE_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600)
_TICK_BUCKETS = (0.01, 0.05, 0.1, 0.2, 0.5, 1, 5, 30)

#: the metrics of this process
REGISTRY = CollectorRegistry()
CLAIMS = Counter("nightpress_claims", "Jobs that this worker claimed.", ("queue",), registry=REGISTRY)
ATTEMPTS = Counter("nightpress_attempts", "Attempts by how they ended.", ("queue", "outcome"), registry=REGISTRY)
LEASES_LOST = Counter("nightpress_leases_lost", "Attempts whose lease was gone before their end.", registry=REGISTRY)
LEASES_EXPIRED = Counter("nightpress_leases_expired", "Jobs that were taken from their workers.", registry=REGISTRY)
PHASES = Histogram(
    "nightpress_phase_seconds", "How long a phase of a job took.", ("phase",), buckets=_PHASE_BUCKETS, registry=REGISTRY
)
GPU_SECONDS = Counter(
    "nightpress_gpu_seconds", "Time that attempts held GPUs; an attempt on n GPUs counts n times.", registry=REGISTRY
)
BYTES_MOVED = Counter("nightpress_transfer_bytes", "Bytes from and to storage.", ("direction",), registry=REGISTRY)
SECONDS_MOVING = Counter(
    "nightpress_transfer_seconds", "Time that moving them took.", ("direction",), registry=REGISTRY
)
TICKS = Histogram(
    "nightpress_tick_seconds", "One step of the control process.", ("step",), buckets=_TICK_BUCKETS, registry=REGISTRY
)


def serve_metrics(port: int) -> None:
    """Serve the metrics from a separate thread; port 0: do not serve them. Raises OSError if the port is in use."""
    if port:
        start_http_server(port, registry=REGISTRY)


class PhaseClock:
    """Times the phases of one attempt."""

    def __init__(self) -> None:
        self._phase = ""
        self._since = time.monotonic()

    def enter(self, phase: str) -> None:
        """Begin a phase and end the current one. An empty name only ends the current phase."""
        now = time.monotonic()
        if phase != self._phase:
            if self._phase:
                PHASES.labels(self._phase).observe(now - self._since)
            self._phase, self._since = phase, now
