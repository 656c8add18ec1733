"""Threads of the control process that deliver results.

Any number of replicas may run. Each delivery has one owner at a time, by a claim that expires; who takes over goes on where the other was.
"""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine

from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service import backoff
from nightpress.core.service.deliveries.addresses import Address, BucketAddress, HubAddress, parse_destination
from nightpress.core.service.deliveries.credentials import CredentialStore
from nightpress.core.service.deliveries.package import Progress, Sender, pack
from nightpress.core.service.deliveries.store import DeliveryStore, DueDelivery
from nightpress.core.service.signing.store import SigningStore
from nightpress.core.settings import Settings

AT_A_TIME = 4
TTL_S = 60.0

log = logging.getLogger(__name__)


class DeliveryCourier:
    """Delivers results; a control process has one. `advance` starts what is due and renews the claims of what runs, without waiting."""

    def __init__(
        self,
        store: DeliveryStore,
        credentials: CredentialStore,
        signing: SigningStore,
        engine: Engine,
        objects: ObjectStore,
        settings: Settings,
        *,
        ttl_s: float = TTL_S,
    ) -> None:
        self._store = store
        self._credentials = credentials
        self._signing = signing
        self._engine = engine
        self._objects = objects
        self._settings = settings
        self._ttl_s = ttl_s
        self._threads = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="delivery")
        self._lock = threading.Lock()
        self._running: dict[str, DueDelivery] = {}
        self._closing = False

    def advance(self) -> int:
        """Returns the number of attempts that were started."""
        with self._lock:
            running = list(self._running.values())
        for due in running:
            if not self._store.renew(due.claim, self._ttl_s):
                due.claim.lost.set()
        free = AT_A_TIME - len(running)
        taken = self._store.take_due(limit=free, ttl_s=self._ttl_s) if free > 0 else []
        for due in taken:
            with self._lock:
                self._running[due.claim.claim_id] = due
            self._threads.submit(self._run, due)
        return len(taken)

    @property
    def running(self) -> int:
        """The number of attempts under way."""
        with self._lock:
            return len(self._running)

    def close(self) -> None:
        """Stop the running attempts and release their claims, so that another process can go on at once."""
        self._closing = True
        with self._lock:
            running = list(self._running.values())
        for due in running:
            due.claim.lost.set()
        self._threads.shutdown(wait=True)

    def _run(self, due: DueDelivery) -> None:
        began = time.monotonic()
        try:
            result = self._deliver(due)
            self._store.settle(due, result=result, duration_s=time.monotonic() - began)
        except NightpressError as error:
            self._settle_badly(due, error, time.monotonic() - began)
        except Exception:
            log.exception("Delivery %s: an unexpected error", due.id)
            hint = "It is tried again. If that goes on, the log of the control process says why."
            self._settle_badly(
                due, NightpressError(ErrorCode.INTERNAL, "An unexpected error.", hint=hint), time.monotonic() - began
            )
        finally:
            with self._lock:
                self._running.pop(due.claim.claim_id, None)

    def _deliver(self, due: DueDelivery) -> dict[str, object]:
        # Parsed again, because the operator may no longer allow the address.
        address = parse_destination(due.destination, self._settings)
        secrets = self._credentials.secrets_for(due.tenant_id, address)
        package = pack(
            due.id, due.job_id, due.artifact, engine=self._engine, objects=self._objects, signing=self._signing
        )
        due.claim.total = package.size
        progress = Progress(due.claim, due.resume, self._store.note)
        sender = _open_sender(address, secrets, self._settings)
        try:
            return sender.send(package, progress)
        finally:
            sender.close()

    def _settle_badly(self, due: DueDelivery, error: NightpressError, duration_s: float) -> None:
        try:
            if due.claim.lost.is_set():
                if self._closing:
                    self._store.release(due.claim)
                return
            pause_s = backoff.pause_after(due.attempts) if error.kind.retryable else None
            log.warning("Delivery %s to %s: %s", due.id, due.destination, error)
            self._store.settle(due, error=error, pause_s=pause_s, duration_s=duration_s)
        except NightpressError as away:  # the database does not answer: the claim expires by itself
            log.warning("Delivery %s could not be settled: %s", due.id, away)


def _open_sender(address: Address, secrets: dict[str, str], settings: Settings) -> Sender:
    if isinstance(address, BucketAddress):
        # boto3 takes 0.2 s to import: import it only for buckets
        from nightpress.core.service.deliveries.bucket import BucketSender

        return BucketSender(address, secrets, settings)
    if isinstance(address, HubAddress):
        from nightpress.core.service.deliveries.hub import HubSender

        return HubSender(address, secrets, settings)
    from nightpress.core.service.deliveries.registry import RegistrySender

    return RegistrySender(address, secrets, settings)
